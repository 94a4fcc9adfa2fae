"""Options of the stages that train a student, against their equations: what a stage reports is computed anew."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from bitdistill_core import checkpoint, losses
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.corpus import BlockBatches, tokenize_corpus
from bitdistill_core.data import ExampleBatches, encode_prompt, load_examples
from bitdistill_core.losses import Batch
from bitdistill_core.quantize.rows import quantize_rows
from bitdistill_core.quantize.weight import WeightQuantizer, quantize_weight
from bitdistill_core.relations import captured
from bitdistill_core.stages import distill, pretrain, surgery, teacher
from bitdistill_core.stages.distill import layer_pairs
from bitdistill_core.stages.student import clear_thresholds, load_teacher, quantization_warmup
from bitdistill_core.stages.training import Context
from tests.core.conftest import Workshop, build, section
from tests.core.hooks import block_outputs


@pytest.fixture
def student(workshop: Workshop) -> Path:
    """A ternary student of the workshop's model `base`."""
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    return workshop.run(surgery, section("surgery"), inputs, "student").path


def first_blocks(workshop: Workshop) -> Batch:
    """The batch of the first step of continued pre-training."""
    tokens = tokenize_corpus(
        workshop.data / "corpus", workshop.tokenizer, max_tokens=256, out=workshop.root / "tokens.bin"
    )
    return BlockBatches(tokens, block_size=32, batch_size=4, gradient_accumulation=1, seed=0)(0)[0]


def first_examples(workshop: Workshop) -> Batch:
    """The batch of the first step of distillation."""
    examples = load_examples(
        workshop.data / "examples" / "train.parquet", workshop.tokenizer, max_length=64, window=64, is_generation=False
    )
    return ExampleBatches(examples, batch_size=8, gradient_accumulation=1, seed=0)(0)[0]


def bit_linears(model: PreTrainedModel) -> list[BitLinear]:
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def load(path: Path) -> PreTrainedModel:
    return checkpoint.load_model(path)[0]


@torch.no_grad()
def relative_distance(ours: PreTrainedModel, theirs: PreTrainedModel, batch: Batch) -> float:
    """|h_s - h_t|^2 / |h_t|^2, mean over blocks and tokens, one token after the other."""
    terms = [
        float((s[row, t] - h[row, t]).square().sum() / h[row, t].square().sum())
        for s, h in zip(block_outputs(ours, batch.input_ids), block_outputs(theirs, batch.input_ids), strict=True)
        for row, length in enumerate(batch.lengths.tolist())
        for t in range(length)
    ]
    return sum(terms) / len(terms)


@torch.no_grad()
def divergence(ours: PreTrainedModel, theirs: PreTrainedModel, batch: Batch, tau: float) -> float:
    """tau^2 KL(teacher || student), mean over tokens."""
    log_s = (ours(batch.input_ids).logits / tau).log_softmax(-1)
    log_t = (theirs(batch.input_ids).logits / tau).log_softmax(-1)
    terms = (log_t.exp() * (log_t - log_s)).sum(-1)[batch.is_token]
    return tau**2 * float(terms.mean())


@torch.no_grad()
def answer_divergence(ours: PreTrainedModel, theirs: PreTrainedModel, batch: Batch, tau: float) -> float:
    """KL(teacher || student) where the answer is predicted, mean over its tokens (Eq. 8-9)."""
    log_s = (ours(batch.input_ids).logits / tau).log_softmax(-1)[:, :-1]
    log_t = (theirs(batch.input_ids).logits / tau).log_softmax(-1)[:, :-1]
    return float((log_t.exp() * (log_t - log_s)).sum(-1)[batch.labels[:, 1:] != -100].mean())


@torch.no_grad()
def cross_entropy(model: PreTrainedModel, batch: Batch) -> float:
    logits: Tensor = model(batch.input_ids).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100))


def test_the_base_teaches_by_logits_and_block_outputs(workshop: Workshop, student: Path) -> None:
    weights = {"task_loss_weight": 0.5, "logits_kd_weight": 3.0, "hidden_kd_weight": 7.0}
    config = section("pretrain", **weights, kd_temperature=2.0)
    inputs = {"student": student, "base": workshop.root / "base", "data": workshop.data}
    reported = dict(workshop.run(pretrain, config, inputs, "pretrain").log)[1]
    ours, base, batch = load(student), load(workshop.root / "base"), first_blocks(workshop)
    expected = {
        "task_loss": 0.5 * cross_entropy(ours, batch),
        "logits_kd": 3.0 * divergence(ours, base, batch, tau=2.0),
        "hidden_kd": 7.0 * relative_distance(ours, base, batch),
    }
    for part, value in expected.items():
        assert reported[f"pretrain/{part}"] == pytest.approx(value, rel=1e-4), part
    assert reported["pretrain/loss"] == pytest.approx(sum(expected.values()), rel=1e-4)


def test_pretraining_without_a_teacher_is_cross_entropy(workshop: Workshop, student: Path) -> None:
    inputs = {"student": student, "base": workshop.root / "nothing", "data": workshop.data}  # not even read
    reported = dict(workshop.run(pretrain, section("pretrain"), inputs, "pretrain").log)[1]
    assert reported["pretrain/loss"] == pytest.approx(cross_entropy(load(student), first_blocks(workshop)), rel=1e-4)
    assert {name for name in reported if "kd" in name} == set()


def test_a_stage_says_what_it_cut_and_how_often_it_read_the_corpus(workshop: Workshop, student: Path) -> None:
    data = {"data": workshop.data}
    whole, cut = (
        workshop.run(
            teacher, section("teacher", max_length=length), {"model": student, **data}, f"teacher-{length}"
        ).log
        for length in (64, 12)
    )
    prompts = pq.read_table(workshop.data / "examples" / "train.parquet")["prompt"].to_pylist()
    too_long = sum(len(encode_prompt(workshop.tokenizer, prompt)) > 12 - 1 for prompt in prompts)
    assert too_long > 0
    assert whole[0] == (0, {"teacher/cut_share": 0.0})
    assert cut[0] == (0, {"teacher/cut_share": too_long / len(prompts)})
    tokens = tokenize_corpus(workshop.data / "corpus", workshop.tokenizer, max_tokens=10**6, out=workshop.root / "all")
    num_tokens = 5 * len(tokens) // 128 * 128
    config = section("pretrain", num_tokens=num_tokens, block_size=32, batch_size=4, report_every=10**6)
    finished = workshop.run(pretrain, config, {"student": student, "base": student, **data}, "pretrain")
    assert finished.log[0] == (0, {"pretrain/corpus_epochs": num_tokens / 32 / (len(tokens) // 32)})


def test_a_part_of_weight_0_is_not_computed(workshop: Workshop, student: Path) -> None:
    config = section("pretrain", task_loss_weight=0.0, hidden_kd_weight=1.0)
    inputs = {"student": student, "base": workshop.root / "base", "data": workshop.data}
    reported = dict(workshop.run(pretrain, config, inputs, "pretrain").log)[1]
    assert {"pretrain/hidden_kd", "pretrain/loss"} <= set(reported)
    assert not {"pretrain/task_loss", "pretrain/logits_kd"} & set(reported)


def test_no_tokens_leave_the_student_as_it_was(workshop: Workshop, student: Path) -> None:
    inputs = {"student": student, "base": workshop.root / "nothing", "data": workshop.data}
    after = workshop.run(pretrain, section("pretrain", num_tokens=0, logits_kd_weight=1.0), inputs, "pretrain").model()
    for name, parameter in load(student).named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_distillation_of_all_layers_and_block_outputs(workshop: Workshop, student: Path, variant: str) -> None:
    teacher = workshop.model("teacher", seed=5)
    config = section("distill", loss=variant, distill_layers=[], hidden_kd_weight=5.0, grad_norm_every=0)
    inputs = {"student": student, "teacher": teacher, "data": workshop.data}
    reported = dict(workshop.run(distill, config, inputs, "distill").log)[1]
    ours, theirs, batch = load(student), load(teacher), first_examples(workshop)
    layers = []
    for layer in (0, 1):  # each alone
        with torch.no_grad(), captured(ours, [layer]) as s, captured(theirs, [layer]) as t:
            losses.hidden_states(ours, batch)
            losses.hidden_states(theirs, batch)
            kd = losses.attention_kd_loss(s, t, [(layer, layer)], batch, num_relation_heads=4, variant=variant)
            layers.append(float(kd))
    assert layers[0] != pytest.approx(layers[1], rel=1e-2)
    assert reported["distill/attention_kd"] == pytest.approx(100.0 * sum(layers) / 2, rel=1e-3)
    assert reported["distill/hidden_kd"] == pytest.approx(5.0 * relative_distance(ours, theirs, batch), rel=1e-4)
    assert reported["distill/task_loss"] == pytest.approx(cross_entropy(ours, batch), rel=1e-4)
    expected = (
        divergence(ours, theirs, batch, 5.0) if variant == "authors" else answer_divergence(ours, theirs, batch, 5.0)
    )
    assert reported["distill/logits_kd"] == pytest.approx(10.0 * expected, rel=1e-3)


def test_without_any_distillation_weight_there_is_no_teacher(workshop: Workshop, student: Path) -> None:
    config = section("distill", logits_kd_weight=0.0, attention_kd_weight=0.0)
    inputs = {"student": student, "teacher": workshop.root / "nothing", "data": workshop.data}
    finished = workshop.run(distill, config, inputs, "distill")
    assert finished.metrics["distill/loss"] == finished.metrics["distill/task_loss"]
    assert not any("kd" in name for _, metrics in finished.log for name in metrics)
    embedding = finished.model().get_input_embeddings().weight
    assert torch.allclose(embedding, quantize_rows(embedding).dequantize(), atol=1e-6)


def test_the_distilled_layers_are_pairs_from_0() -> None:
    shallow, deep = build("qwen3"), build("qwen3", num_hidden_layers=4, layer_types=None)

    def pairs(ours: list[int], theirs: list[int], student: Any, teacher: Any) -> list[tuple[int, int]]:
        config = section("distill", distill_layers=ours, teacher_layers=theirs)
        return layer_pairs(config, student.config, teacher.config)

    assert pairs([], [], shallow, deep) == [(0, 0), (1, 1)]
    assert pairs([-1], [], shallow, deep) == [(1, 3)]
    assert pairs([0, -1], [1, 2], shallow, deep) == [(0, 1), (1, 2)]
    with pytest.raises(ValueError, match=r"distill_layers must name layers of a model with num_layers=2; got 2"):
        pairs([2], [], shallow, deep)
    with pytest.raises(ValueError, match=r"teacher_layers must name layers of a model with num_layers=2; got 2"):
        pairs([], [], deep, shallow)


def test_two_student_layers_may_learn_from_one_of_the_teacher(workshop: Workshop, student: Path) -> None:
    config = section("distill", distill_layers=[0, 1], teacher_layers=[1, 1])
    inputs = {"student": student, "teacher": workshop.model("teacher", seed=4), "data": workshop.data}
    assert workshop.run(distill, config, inputs, "distill").metrics["distill/attention_kd"] > 0


def test_block_outputs_of_a_deeper_teacher_are_refused(workshop: Workshop, student: Path) -> None:
    teacher = workshop.model("teacher", num_hidden_layers=3, layer_types=None)
    inputs = {"student": student, "teacher": teacher, "data": workshop.data}
    with pytest.raises(ValueError, match=r"got student=\(2, 32\), teacher=\(3, 32\); turn it off"):
        workshop.run(distill, section("distill", hidden_kd_weight=1.0), inputs, "distill")


def test_a_teacher_of_another_vocabulary_is_refused(workshop: Workshop, student: Path) -> None:
    teacher = workshop.model("teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(teacher)
    size = len(workshop.tokenizer)
    inputs = {"student": student, "teacher": teacher, "data": workshop.data}
    with pytest.raises(ValueError, match=rf"must share a vocabulary; got sizes {size + 1} and {size}"):
        workshop.run(distill, section("distill"), inputs, "distill")


def hardness(model: PreTrainedModel) -> set[float]:
    return {module.hardness for module in model.modules() if isinstance(module, BitLinear)}


def test_the_warm_up_rises_over_its_share_of_the_steps(student: Path) -> None:
    model, seen = load(student), []
    with quantization_warmup(model, 0.5) as on_step:
        assert on_step is not None
        for step in range(8):
            on_step(step, 8)
            seen.append(hardness(model))
    assert seen == [{0.25}, {0.5}, {0.75}, {1.0}, {1.0}, {1.0}, {1.0}, {1.0}]
    with quantization_warmup(model, 0.01) as on_step:  # less than a step
        assert on_step is not None
        on_step(0, 8)
        assert hardness(model) == {1.0}
    with quantization_warmup(model, 0.0) as on_step:
        assert on_step is None


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_a_warm_up_makes_other_weights_and_ends_quantised(workshop: Workshop, student: Path, stage: str) -> None:
    teacher = workshop.root / "base"
    runner, inputs = {
        "pretrain": (pretrain, {"student": student, "base": teacher, "data": workshop.data}),
        "distill": (distill, {"student": student, "teacher": teacher, "data": workshop.data}),
    }[stage]
    seen: list[list[float]] = []
    for share in (0.0, 1.0):
        run = workshop.run(runner, section(stage, quantization_warmup=share), inputs, f"{stage}-{share}")
        seen.append([metrics[f"{stage}/task_loss"] for _, metrics in run.log if f"{stage}/task_loss" in metrics])
    assert len(seen[0]) == len(seen[1]) == 2
    assert seen[0][0] != pytest.approx(seen[1][0], rel=1e-4)


def test_an_error_in_training_leaves_every_layer_quantised(student: Path) -> None:
    model = load(student)

    def fail(share: float) -> None:
        with quantization_warmup(model, share) as on_step:
            assert on_step is not None
            on_step(0, 10)
            assert hardness(model) == {0.1}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(1.0)
    assert hardness(model) == {1.0}


def test_balanced_terms_have_the_task_gradients_norm(workshop: Workshop, student: Path) -> None:
    config = section("distill", num_epochs=1.0, grad_norm_every=2, balance_grad_norms=0.5, hidden_kd_weight=1.0)
    inputs = {"student": student, "teacher": workshop.model("teacher", seed=4), "data": workshop.data}
    log = workshop.run(distill, config, inputs, "distill").log
    first = next(metrics for step, metrics in log if step == 1 and "distill/grad_norm_task_loss" in metrics)
    for part in ("logits_kd", "attention_kd", "hidden_kd"):
        assert first[f"distill/grad_norm_{part}"] == pytest.approx(0.5 * first["distill/grad_norm_task_loss"], rel=1e-4)


def test_weights_move_away_from_the_thresholds_and_the_model_stays(workshop: Workshop, student: Path) -> None:
    before, after, batch = load(student), load(student), first_examples(workshop)
    clear_thresholds(after, 0.2)
    for ours, theirs in zip(bit_linears(after), bit_linears(before), strict=True):
        codes, scale = quantize_weight(ours.weight, ours.quantizer)
        old_codes, old_scale = quantize_weight(theirs.weight, theirs.quantizer)
        assert torch.equal(codes, old_codes)
        torch.testing.assert_close(scale, old_scale, rtol=1e-6, atol=0)
        assert (ours.weight.abs() / scale - 0.5).abs().min() >= 0.2 - 1e-5
        assert not torch.equal(ours.weight, theirs.weight)
    with torch.no_grad():
        torch.testing.assert_close(after(batch.input_ids).logits, before(batch.input_ids).logits, rtol=1e-3, atol=1e-3)


def test_distillation_begins_with_the_margin(workshop: Workshop, student: Path) -> None:
    config = section("distill", threshold_margin=0.1, learning_rate=1e-12, weight_decay=0.0)
    inputs = {"student": student, "teacher": workshop.model("teacher", seed=4), "data": workshop.data}
    after, expected = workshop.run(distill, config, inputs, "distill").model(), load(student)
    clear_thresholds(expected, 0.1)
    for ours, theirs in zip(bit_linears(after), bit_linears(expected), strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-7)


def test_a_margin_needs_the_absmean_scale(workshop: Workshop, student: Path) -> None:
    model = load(student)
    for layer in bit_linears(model):
        layer.quantizer = WeightQuantizer(scale_rule="least_squares")
    with pytest.raises(ValueError, match="threshold_margin needs scale_rule=absmean; got scale_rule=least_squares"):
        clear_thresholds(model, 0.1)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_a_teacher_in_bfloat16_keeps_its_positions(workshop: Workshop, model_type: str) -> None:
    path = workshop.model("teacher", model_type)
    context = Context("distill", path.parent, lambda metrics, step: None, torch.device("cpu"))
    config = section("distill", precision="bfloat16")
    taught, _ = load_teacher(path, build(model_type), config, context, ExitStack())
    assert {p.dtype for p in taught.parameters()} == {torch.bfloat16}
    buffers = dict(taught.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, value in load(path).named_buffers():
        assert torch.equal(value, buffers[name]), name
        assert buffers[name].dtype == value.dtype
