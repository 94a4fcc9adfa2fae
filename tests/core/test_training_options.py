"""Settings that training passes on, each where it takes effect."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bitdistill_core import checkpoint, losses
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.data import encode_answer, encode_prompt, load_examples
from bitdistill_core.losses import Batch, Totals
from bitdistill_core.quantize.rows import quantize_rows
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.stages import bitnet_sft, distill, pretrain, surgery
from bitdistill_core.stages.training import add_dropout, round_embeddings
from tests.core.conftest import Workshop, build, section


@pytest.fixture
def student(workshop: Workshop) -> Path:
    """A ternary student of the workshop's model `base`."""
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    return workshop.run(surgery, section("surgery"), inputs, "student").path


def test_dropout_drops_its_share_while_training_only() -> None:
    model = build("qwen3")
    ids = torch.arange(64).view(4, 16) % 97
    add_dropout(model, 0.4)
    seen: list[torch.Tensor] = []
    for module in (model.get_input_embeddings(), *model.get_decoder().layers):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.train()(ids)
    assert len(seen) == 3
    for states in seen:
        assert float((states == 0).float().mean()) == pytest.approx(0.4, abs=0.05)
    seen.clear()
    model.eval()(ids)
    assert not any((states == 0).any() for states in seen)


def test_blocks_are_trained_with_their_own_rate_and_channel_weights(workshop: Workshop, student: Path) -> None:
    teacher = workshop.model("teacher", seed=5)
    blocks = {"num_epochs": 1.0, "learning_rate": 7e-4, "batch_size": 8, "num_tokens": 10**6, "drop_contained": False}
    inputs = {"student": student, "teacher": teacher, "data": workshop.data}
    first = {}
    for weights in ("none", "next_norm"):
        config = section("distill", blockwise={**blocks, "channel_weights": weights}, schedule="constant")
        log = workshop.run(distill, config, inputs, f"distill-{weights}").log
        first[weights] = next(metrics for _, metrics in log if "distill.blockwise/loss" in metrics)
    assert {metrics["distill.blockwise/learning_rate"] for metrics in first.values()} == {7e-4}
    plain, weighted = (first[weights]["distill.blockwise/loss"] for weights in ("none", "next_norm"))
    assert plain != pytest.approx(weighted, rel=1e-3)  # the gains of the norms differ


def test_blocks_have_the_teacher_s_frame_unrounded(workshop: Workshop, student: Path) -> None:
    teacher = workshop.model("teacher", seed=5)
    config = section(
        "distill",
        precision="bfloat16",
        learning_rate=1e-30,
        logits_kd_weight=0.0,
        attention_kd_weight=0.0,
        blockwise={
            "num_epochs": 1.0,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "num_tokens": 10**6,
            "drop_contained": False,
            "channel_weights": "none",
        },
    )
    inputs = {"student": student, "teacher": teacher, "data": workshop.data}
    ours = workshop.run(distill, config, inputs, "distill").model()
    theirs, _ = checkpoint.load_model(teacher)
    assert torch.equal(ours.get_decoder().norm.weight, theirs.get_decoder().norm.weight)


def test_pre_training_begins_away_from_the_thresholds(workshop: Workshop, student: Path) -> None:
    inputs = {"student": student, "base": workshop.root / "base", "data": workshop.data}
    config = section("pretrain", threshold_margin=0.1, learning_rate=1e-30)
    layers = [
        m for m in workshop.run(pretrain, config, inputs, "pretrain").model().modules() if isinstance(m, BitLinear)
    ]
    for layer in layers:
        scale = layer.weight.abs().mean()
        assert (layer.weight.abs() / scale - 0.5).abs().min() >= 0.1 - 1e-4


def test_the_baseline_has_no_subln_and_the_papers_quantiser(workshop: Workshop) -> None:
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    config = section("bitnet_sft", num_epochs=0.5, max_length=64, batch_size=8)
    model = workshop.run(bitnet_sft, config, inputs, "bitnet_sft").model()
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    assert len(layers) == 2 * 7
    assert all(layer.input_norm is None for layer in layers)
    assert all(layer.quantizer == WeightQuantizer() for layer in layers)


def test_logits_are_capped_as_the_model_caps_them() -> None:
    model = build("gemma3_text", final_logit_softcapping=2.0)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        hidden = losses.hidden_states(model, Batch(ids, ids, torch.tensor([12]), Totals(1, 12, 11)))
        logits = losses.head_logits(model, hidden)
        torch.testing.assert_close(logits, model(ids).logits)
    assert float(logits.abs().max()) <= 2.0


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_logits_kd_compares_the_words_that_both_models_have(variant: str) -> None:
    student, teacher = build("qwen3"), build("qwen3", vocab_size=105, seed=1)  # 105: padded
    ids = torch.arange(12).view(1, 12)
    labels = torch.where(ids < 8, -100, ids)
    batch = Batch(ids, labels, torch.tensor([12]), Totals(1, 12, 4))
    with torch.no_grad():
        ours, theirs = losses.hidden_states(student, batch), losses.hidden_states(teacher, batch)
        found = losses.logits_kd_loss(student, ours, teacher, theirs, batch, kd_temperature=2.0, variant=variant)
        log_s = (student(ids).logits[0] / 2.0).log_softmax(-1)
        log_t = (teacher(ids).logits[0, :, :97] / 2.0).log_softmax(-1)
    terms = (log_t.exp() * (log_t - log_s)).sum(-1)
    expected = terms[7:11].mean() if variant == "paper" else 4.0 * terms.mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_a_text_to_learn_ends_with_the_end_token_or_is_cut(workshop: Workshop, tmp_path: Path) -> None:
    tokenizer = workshop.tokenizer
    texts = [" the cat sat", " the film of the story kept the mat warm" * 6]
    prompts = ["a b", "a b", "the cat " * 30]
    pq.write_table(pa.table({"prompt": prompts, "answer": [*texts, texts[1]]}), tmp_path / "texts.parquet")
    short, long, both = load_examples(
        tmp_path / "texts.parquet", tokenizer, max_length=32, window=64, is_generation=True
    )
    assert short.answer_ids == [*encode_answer(tokenizer, texts[0], ends=False), tokenizer.eos_token_id]
    assert not short.is_cut
    whole = encode_answer(tokenizer, texts[1], ends=False)
    assert long.answer_ids == whole[: 32 - len(long.prompt_ids)]
    assert long.prompt_ids == encode_prompt(tokenizer, prompts[0])
    assert both.answer_ids == whole[:16]
    assert len(both.prompt_ids) == 16
    assert long.is_cut
    assert both.is_cut


def test_a_long_text_to_go_on_from_loses_its_middle(workshop: Workshop, tmp_path: Path) -> None:
    prompt = "the film was about a cat " * 9 + "sat:"
    pq.write_table(pa.table({"prompt": [prompt], "answer": [" the"]}), tmp_path / "texts.parquet")
    tokenizer = workshop.tokenizer
    (example,) = load_examples(tmp_path / "texts.parquet", tokenizer, max_length=23, window=64, is_generation=True)
    ids, room = encode_prompt(tokenizer, prompt), 23 - len(example.answer_ids)
    assert example.prompt_ids == [*ids[: room - room // 2], *ids[len(ids) - room // 2 :]]


def test_the_length_of_a_cut_prompt_does_not_tell_its_label(workshop: Workshop, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["the cat " * 30] * 2, "answer": [" a", " the mat was warm"]})
    pq.write_table(table, tmp_path / "texts.parquet")
    first, second = load_examples(
        tmp_path / "texts.parquet", workshop.tokenizer, max_length=32, window=64, is_generation=False
    )
    assert len(first.answer_ids) < len(second.answer_ids)
    assert first.prompt_ids == second.prompt_ids
    assert len(second.prompt_ids) + len(second.answer_ids) == 32


def test_a_head_of_its_own_is_rounded_too() -> None:
    model = build("llama")
    round_embeddings(model)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.get_parameter("weight")
        assert torch.allclose(weight, quantize_rows(weight).dequantize(), atol=1e-6)
