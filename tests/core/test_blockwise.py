"""Block-wise distillation: its inputs, targets and errors against plain forward passes, and what it leaves alone."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill_core import checkpoint
from bitdistill_core.block_outputs import hidden_kd_loss
from bitdistill_core.blockwise import _next_gains, take_over_frame, train_blocks
from bitdistill_core.losses import Batch
from bitdistill_core.manifest import Metrics
from bitdistill_core.passage import Passage
from bitdistill_core.stages import distill, pretrain, surgery, training
from tests.core.batches import make_batch, split
from tests.core.conftest import Workshop, build, section
from tests.core.hooks import block_outputs, num_hooks
from tests.core.students import student_of

BLOCKWISE = {"num_epochs": 4, "learning_rate": 3e-3, "batch_size": 0, "num_tokens": 10**6, "channel_weights": "none"}
ON_TASK = {**BLOCKWISE, "drop_contained": False}
OPTIONS: dict[str, Any] = {
    "name": "distill.blockwise",
    "num_epochs": 20,
    "seed": 0,
    "device": torch.device("cpu"),
    "learning_rate": 3e-3,
    "schedule": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "precision": "float32",
    "report_every": 1,
    "checkpoint_every": 3,
}
# longer than Gemma's sliding window of 16
STEPS = [[make_batch([18, 20, 12], [1, 1, 1], seed=1)], [make_batch([7, 9], [1, 1], seed=2)]]


def last_error(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> float:
    """|h_s - h_t|^2 / |h_t|^2 behind the last block of whole models, mean over tokens."""
    with torch.no_grad():
        ours, theirs = (block_outputs(model, batch.input_ids)[-1] for model in (student, teacher))
    error = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
    return float(error[batch.is_token].mean())


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_sequences_pass_the_blocks_as_in_a_whole_forward_pass(any_model: PreTrainedModel) -> None:
    batches = [batch for step in STEPS for batch in step]
    passage = Passage.begin(any_model, [batch.input_ids for batch in batches])
    with torch.no_grad():
        whole = [block_outputs(any_model, batch.input_ids) for batch in batches]
    for index in passage.blocks("test"):
        assert passage.block is any_model.get_decoder().layers[index]
        if index:
            for states, outputs in zip(passage.hidden, whole, strict=True):
                torch.testing.assert_close(states, outputs[index - 1])
    for states, outputs in zip(passage.hidden, whole, strict=True):
        torch.testing.assert_close(states, outputs[-1])
    assert num_hooks(any_model) == 0


def test_every_block_comes_nearer_to_its_teacher_and_nothing_else_changes(
    any_model: PreTrainedModel, tmp_path: Path
) -> None:
    teacher, student = any_model, student_of(any_model)
    before, taught, log = parameters(student), parameters(teacher), []
    first = [last_error(student, teacher, batch) for step in STEPS for batch in step]
    metrics = train_blocks(
        student, teacher, STEPS, work_dir=tmp_path, report=lambda metrics, step: log.append((step, metrics)), **OPTIONS
    )
    errors = [last_error(student, teacher, batch) for step in STEPS for batch in step]
    assert sum(errors) < 0.7 * sum(first)
    assert metrics["distill.blockwise/block_error"] == pytest.approx(sum(errors) / 2, rel=1e-4)
    steps = [step for step, reported in log if "distill.blockwise/loss" in reported]
    assert steps == list(range(1, 2 * 40 + 1))  # two blocks, 20 epochs of two steps each
    ends = [step for step, reported in log if "distill.blockwise/block_error" in reported]
    assert ends == [40, 80]
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".layers." in name}
    assert all(torch.equal(value, taught[name]) for name, value in teacher.named_parameters())


def test_what_lies_outside_the_blocks_is_the_teachers(any_model: PreTrainedModel, tmp_path: Path) -> None:
    student, teacher = student_of(any_model), build(any_model.config.model_type, seed=5)
    options = {**OPTIONS, "num_epochs": 1, "learning_rate": 1e-30}
    take_over_frame(student, teacher)
    train_blocks(student, teacher, STEPS, work_dir=tmp_path, report=lambda *_: None, **options)
    outside = [name for name in parameters(student) if ".layers." not in name]
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(outside)
    for name in outside:
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name)), name


def test_a_block_is_trained_on_what_the_finished_student_blocks_put_out(tmp_path: Path) -> None:
    teacher = build("qwen3")
    student = student_of(teacher)
    log: list[dict[str, float]] = []
    options = {**OPTIONS, "num_epochs": 1, "learning_rate": 1e-30}
    train_blocks(student, teacher, STEPS[:1], work_dir=tmp_path, report=lambda m, _: log.append(m), **options)
    expected = last_error(student, teacher, STEPS[0][0])  # the rate moves nothing
    assert log[2]["distill.blockwise/loss"] == pytest.approx(expected, rel=1e-4)


def test_in_bfloat16_a_step_sees_the_biases_that_the_last_one_left(tmp_path: Path) -> None:
    teacher, log = build("qwen2"), []
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    student = student_of(teacher)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    options = {**OPTIONS, "precision": "bfloat16", "learning_rate": 3e-2}
    train_blocks(student, teacher, STEPS[:1], work_dir=tmp_path, report=lambda m, _: log.append(m), **options)
    with torch.autocast("cpu", torch.bfloat16):
        expected = last_error(student, teacher, STEPS[0][0])
    assert log[-1]["distill.blockwise/block_error"] == pytest.approx(expected, rel=0.05)


def test_micro_batches_make_the_same_step(tmp_path: Path) -> None:
    teacher, ends = build("llama"), []
    whole = STEPS[0][0]
    for number, steps in enumerate(([[whole]], [split(whole)])):
        student = student_of(teacher)
        options = {**OPTIONS, "num_epochs": 3}
        train_blocks(student, teacher, steps, work_dir=tmp_path / str(number), report=lambda *_: None, **options)
        ends.append(last_error(student, teacher, whole))
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


@pytest.mark.parametrize("stop_at", [5, 40, 47])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, stop_at: int) -> None:
    teacher = build("qwen3")
    whole, resumed = student_of(teacher), student_of(teacher)
    train_blocks(whole, teacher, STEPS, work_dir=tmp_path / "whole", report=lambda *_: None, **OPTIONS)

    def stop(metrics: dict[str, float], step: int) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_blocks(resumed, teacher, STEPS, work_dir=tmp_path / "cut", report=stop, **OPTIONS)
    resumed, seen = student_of(teacher), []
    train_blocks(resumed, teacher, STEPS, work_dir=tmp_path / "cut", report=lambda _, s: seen.append(s), **OPTIONS)
    assert min(seen) == (40 if stop_at >= 40 else stop_at // 3 * 3 + 1)
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name]), name


def test_distillation_trains_blocks_first_and_keeps_to_the_tokens(workshop: Workshop) -> None:
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    student = workshop.run(surgery, section("surgery"), inputs, "student").path
    inputs = {"student": student, "teacher": workshop.model("teacher", seed=4), "data": workshop.data}
    kd = {"logits_kd_weight": 0.0, "attention_kd_weight": 0.0, "grad_norm_every": 0}
    finished = workshop.run(distill, section("distill", blockwise={**ON_TASK, "num_tokens": 1}, **kd), inputs, "one")
    blockwise = [step for step, m in finished.log if "distill.blockwise/loss" in m]
    assert blockwise == list(range(1, 9))  # one batch, 4 epochs, 2 blocks
    after = [m for _, m in finished.log if "distill/loss" in m]
    assert len(after) == 2
    assert not any("kd" in name for name in after[0])  # cross-entropy alone follows
    finished = workshop.run(distill, section("distill", blockwise=ON_TASK, **kd), inputs, "all")
    assert max(step for step, m in finished.log if "distill.blockwise/loss" in m) == 4 * 4 * 2  # 32 examples in eights
    finished = workshop.run(distill, section("distill", blockwise={**ON_TASK, "batch_size": 4}, **kd), inputs, "fours")
    assert max(step for step, m in finished.log if "distill.blockwise/loss" in m) == 4 * 8 * 2
    assert max(step for step, m in finished.log if "distill/loss" in m) == 4 * section("distill").num_epochs


def test_blocks_leave_out_examples_within_longer_ones(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workshop.data / "examples" / "train.parquet"
    whole = [f"the {noun} {verb} {number}" for number in "123" for noun in ("cat", "dog") for verb in ("sat", "ran")]
    parts = [text.split(" ", 1)[1] for text in whole]  # without "the"
    rows = pq.read_table(path).slice(0, 24).to_pydict()
    rows["prompt"] = [f"Review: {text}\nSentiment:" for text in [*parts, *whole]]
    pq.write_table(pa.table(rows), path)
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    student = workshop.run(surgery, section("surgery"), inputs, "student").path
    inputs = {"student": student, "teacher": workshop.model("teacher", seed=4), "data": workshop.data}
    seen: dict[str, list[Batch]] = {}
    monkeypatch.setattr(
        "bitdistill_core.stages.student.train_blocks",
        lambda *args, name, **options: seen.setdefault(name, [b for step in args[2] for b in step]) and {},
    )
    config = section("distill", batch_size=4, num_epochs=1, blockwise={**BLOCKWISE, "drop_contained": True})
    finished = workshop.run(distill, config, inputs, "out")
    texts = [
        workshop.tokenizer.decode(row[:length])
        for batch in seen["distill.blockwise"]
        for row, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True)
    ]
    assert len(texts) == len(whole)
    assert all("Review: the " in text for text in texts)
    assert max(step for step, m in finished.log if "distill/loss" in m) == 24 // 4  # all of them afterwards


def test_blocks_are_not_trained_again_when_distillation_goes_on(workshop: Workshop) -> None:
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    student = workshop.run(surgery, section("surgery"), inputs, "student").path
    config = section("distill", blockwise=ON_TASK, num_epochs=1, checkpoint_every=1)
    stages = distill.Inputs(student=student, teacher=workshop.model("teacher", seed=4), data=workshop.data)
    log: list[str] = []

    def stop(metrics: dict[str, float], step: int) -> None:
        log.extend(metrics)
        if "distill/loss" in metrics and step == 3:
            raise KeyboardInterrupt

    def go(name: str, report: Any = lambda *_: None) -> tuple[PreTrainedModel, Metrics]:
        out, work = workshop.root / f"out-{name}", workshop.root / f"work-{name}"
        out.mkdir(exist_ok=True)
        metrics = distill.run(config, stages, out_dir=out, work_dir=work, report=report, device=torch.device("cpu"))
        return checkpoint.load_model(out)[0], metrics

    with pytest.raises(KeyboardInterrupt):
        go("cut", stop)
    log.clear()
    resumed, metrics = go("cut", lambda metrics, step: log.extend(metrics))
    assert "distill/loss" in log
    assert not any("blockwise" in name for name in log)
    whole, expected = go("whole")
    assert metrics["distill.blockwise/block_error"] == expected["distill.blockwise/block_error"] > 0
    for name, value in parameters(whole).items():
        assert torch.equal(value, resumed.get_parameter(name)), name


def test_pretraining_trains_blocks_on_the_corpus_and_nothing_else_with_no_tokens(workshop: Workshop) -> None:
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    student = workshop.run(surgery, section("surgery"), inputs, "student").path
    inputs = {"student": student, "base": workshop.root / "base", "data": workshop.data}
    config = section("pretrain", num_tokens=0, blockwise={**BLOCKWISE, "num_tokens": 256})
    finished = workshop.run(pretrain, config, inputs, "pretrained")
    errors = [m["pretrain.blockwise/block_error"] for _, m in finished.log if "pretrain.blockwise/block_error" in m]
    assert len(errors) == 2
    assert not any("pretrain/loss" in m for _, m in finished.log)
    before, after = parameters(checkpoint.load_model(student)[0]), parameters(finished.model())
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if ".layers." in n}


def test_a_teacher_of_other_depth_is_refused(workshop: Workshop) -> None:
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    student = workshop.run(surgery, section("surgery"), inputs, "student").path
    teacher = workshop.model("teacher", num_hidden_layers=3, layer_types=None)
    inputs = {"student": student, "teacher": teacher, "data": workshop.data}
    with pytest.raises(ValueError, match=r"distill\.blockwise compares block with block.*got student=\(2, 32\), tea"):
        workshop.run(distill, section("distill", blockwise=ON_TASK), inputs, "distilled")


def test_gains_are_those_of_the_norm_that_reads_a_block(any_model: PreTrainedModel) -> None:
    decoder = any_model.get_decoder()
    generator = torch.Generator().manual_seed(0)
    norms = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
    x = torch.randn(5, any_model.config.hidden_size, generator=generator)
    for index, norm in enumerate(norms):
        gains = _next_gains(any_model, index)
        torch.testing.assert_close(norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gains)


def test_blocks_are_trained_on_the_channels_that_the_next_norm_weighs(tmp_path: Path) -> None:
    teacher = build("llama").requires_grad_(False)
    with torch.no_grad():  # half of the channels count for nothing behind the first block
        teacher.get_decoder().layers[1].input_layernorm.weight[::2] = 1e-3
    counts = torch.arange(teacher.config.hidden_size) % 2 == 1
    flat = [batch for step in STEPS for batch in step]
    errors = {}
    for weights in ("none", "next_norm"):
        student = student_of(teacher)
        log: list[Metrics] = []
        train_blocks(
            student,
            teacher,
            STEPS,
            work_dir=tmp_path / weights,
            report=lambda metrics, _, log=log: log.append(metrics),
            channel_weights=weights,
            **OPTIONS,
        )
        relative, wanted = [], 0.0
        for batch in flat:
            with torch.no_grad():
                ours, theirs = (block_outputs(model, batch.input_ids)[0] for model in (student, teacher))
            relative.append(hidden_kd_loss([ours[..., counts]], [theirs[..., counts]], batch))
            gains = _next_gains(teacher, 0) if weights == "next_norm" else torch.ones(())
            wanted += float(hidden_kd_loss([ours * gains], [theirs * gains], batch))
        errors[weights] = float(sum(relative))
        reported = next(m["distill.blockwise/block_error"] for m in log if "distill.blockwise/block_error" in m)
        assert reported == pytest.approx(wanted / len(STEPS), rel=1e-4)
    assert errors["next_norm"] < 0.9 * errors["none"]


def test_the_text_of_a_prompt_is_what_the_template_puts_columns_in(tmp_path: Path) -> None:
    template = "Ticket {{json}}: {text} of {place} {{end}}:"
    rows = [{"text": "late", "place": "Rome"}, {"text": "lost", "place": "Oslo"}]
    pq.write_table(pa.table({"prompt": [template.format(**row) for row in rows]}), tmp_path / "train.parquet")
    assert training._prompt_texts(tmp_path / "train.parquet", template) == ["late of Rome", "lost of Oslo"]
