"""The training loop: it learns, resumes exactly, and stops at what is not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill_core import losses, train
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.data import Example, ExampleBatches
from bitdistill_core.schedules import learning_rate_factor
from bitdistill_core.stages.student import quantization_warmup
from bitdistill_core.surgery import operate
from tests.core.conftest import build

EXAMPLES = [Example([5 + i % 7, 9, 11], [20 + i % 2]) for i in range(24)]
OPTIONS: dict[str, Any] = {
    "name": "toy",
    "seed": 0,
    "learning_rate": 1e-2,
    "schedule": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "adam_beta2": 0.99,
    "max_grad_norm": 1.0,
    "precision": "float32",
    "report_every": 1,
    "checkpoint_every": 4,
    "device": torch.device("cpu"),
}


def fit(
    work_dir: Path, *, num_steps: int = 12, log: list[tuple[int, dict[str, float]]] | None = None, **changes: Any
) -> Any:
    """A student on a toy task, from scratch or from what work_dir holds."""
    model = changes.pop("model", None)
    if model is None:
        model = build("qwen3")
        operate(model, subln="output", sub_norm_eps=1e-6)
    batches = ExampleBatches(EXAMPLES, batch_size=4, gradient_accumulation=2, seed=3)
    options: dict[str, Any] = {
        **OPTIONS,
        "num_steps": num_steps,
        "work_dir": work_dir,
        "report": lambda metrics, step: log.append((step, metrics)) if log is not None else None,
    }

    def loss_fn(batch: losses.Batch) -> train.LossParts:
        return {"task_loss": losses.task_loss(model, losses.hidden_states(model, batch), batch)}

    loss_fn = changes.pop("loss_fn", loss_fn)
    train.fit(model, batches, loss_fn, **{**options, **changes})
    return model


def test_the_loss_falls(tmp_path: Path) -> None:
    log: list[tuple[int, dict[str, float]]] = []
    fit(tmp_path, num_steps=30, log=log)
    assert log[-1][1]["toy/loss"] < 0.5 * log[0][1]["toy/loss"]
    assert {"toy/loss", "toy/task_loss", "toy/learning_rate", "toy/grad_norm", "toy/tokens_per_second"} <= set(
        log[0][1]
    )


def test_a_report_has_the_means_of_its_steps_and_the_last_gradient_norm(tmp_path: Path) -> None:
    every: list[tuple[int, dict[str, float]]] = []
    some: list[tuple[int, dict[str, float]]] = []
    fit(tmp_path / "every", log=every)
    fit(tmp_path / "some", log=some, report_every=5)
    assert [step for step, _ in some] == [5, 10, 12]
    for (step, metrics), first in zip(some, (0, 5, 10), strict=True):
        own = [found for _, found in every[first:step]]
        for part in ("toy/loss", "toy/task_loss"):
            assert metrics[part] == pytest.approx(sum(found[part] for found in own) / len(own))
        assert metrics["toy/grad_norm"] == own[-1]["toy/grad_norm"]
        assert metrics["toy/learning_rate"] == own[-1]["toy/learning_rate"]


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")

    class Killed(Exception):
        pass

    def die(metrics: dict[str, float], step: int) -> None:
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path / "part", report=die)
    assert (tmp_path / "part" / "step-4").is_dir()
    steps: list[tuple[int, dict[str, float]]] = []
    resumed = fit(tmp_path / "part", log=steps)
    assert steps[0][0] == 5
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_same_seed_same_bits(tmp_path: Path) -> None:
    first, second = fit(tmp_path / "a"), fit(tmp_path / "b")
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(tmp_path: Path) -> None:
    calls = [0]

    def loss_fn(batch: losses.Batch) -> train.LossParts:
        calls[0] += 1
        scale = float("nan") if calls[0] > 10 else 1.0  # two micro-batches a step: step 6
        return {"task_loss": scale * torch.ones((), requires_grad=True)}

    with pytest.raises(ValueError, match=r"toy diverged at step=6: loss, task_loss.* is not finite.* is step-4"):
        fit(tmp_path, loss_fn=loss_fn)
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]
    calls[0] = 0
    rare = tmp_path / "rare"  # what is read later is of the same step
    with pytest.raises(ValueError, match=r"toy diverged at step=6: loss"):
        fit(rare, loss_fn=loss_fn, report_every=100)
    assert [p.name for p in rare.iterdir()] == ["step-4"]


def test_gradient_norms_of_parts_are_reported(tmp_path: Path) -> None:
    _, log = fit_weight(
        tmp_path, lambda weight: {"a": weight.square().sum(), "b": 10 * weight.sum()}, num_steps=1, grad_norm_every=1
    )
    assert log[1]["toy/grad_norm_a"] == pytest.approx(10.0)
    assert log[1]["toy/grad_norm_b"] == pytest.approx(10 * 2**0.5)
    assert log[1]["toy/loss"] == pytest.approx(25 + 70)


def fit_weight(
    work_dir: Path, loss_fn: Callable[[torch.nn.Parameter], train.LossParts], **changes: Any
) -> tuple[torch.nn.Parameter, dict[int, dict[str, float]]]:
    """Trains a model that is one matrix, from [[3, 4]]; the matrix and what was reported, by step."""
    model, log = torch.nn.Module(), {}
    model.weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    batch = losses.Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.ones(1), losses.Totals(1, 1, 1))
    options: dict[str, Any] = {
        **OPTIONS,
        "num_steps": 10,
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
        "checkpoint_every": 100,
        "work_dir": work_dir,
        "report": lambda metrics, step: log.setdefault(step, {}).update(metrics),
    }
    train.fit(model, lambda step: [batch], lambda batch: loss_fn(model.weight), **{**options, **changes})
    return model.weight, log


@pytest.mark.parametrize("target", [1.0, 0.25])
def test_balance_holds_each_term_at_so_many_times_the_task_gradient(tmp_path: Path, target: float) -> None:
    def loss_fn(weight: torch.nn.Parameter) -> train.LossParts:
        return {"task_loss": 2 * weight.sum(), "logits_kd": 700 * weight[0, 0], "hidden_kd": 1e-3 * weight.sum()}

    _, log = fit_weight(tmp_path, loss_fn, grad_norm_every=4, balance_grad_norms=target)
    for step in (1, 5, 9):  # 1-based; measured before it
        assert log[step]["toy/grad_norm_task_loss"] == pytest.approx(2 * 2**0.5)
        assert log[step]["toy/grad_norm_logits_kd"] == pytest.approx(target * 2 * 2**0.5)
        assert log[step]["toy/grad_norm_hidden_kd"] == pytest.approx(target * 2 * 2**0.5)
    for step in range(1, 11):  # the loss that the optimiser sees, between measurements too
        logits_kd, hidden_kd = target * 2 * 2**0.5, target * 2
        assert log[step]["toy/grad_norm"] == pytest.approx(
            ((2 + hidden_kd + logits_kd) ** 2 + (2 + hidden_kd) ** 2) ** 0.5, rel=1e-5
        )
        parts = sum(log[step][f"toy/{part}"] for part in ("task_loss", "logits_kd", "hidden_kd"))
        assert log[step]["toy/loss"] == pytest.approx(parts, rel=1e-6)


def test_balance_follows_a_moving_average_of_the_measured_norms(tmp_path: Path) -> None:
    factor = [0]

    def loss_fn(weight: torch.nn.Parameter) -> train.LossParts:
        return {"task_loss": weight.sum(), "logits_kd": factor[0] * weight.sum()}

    def on_step(step: int, num_steps: int) -> None:
        factor[0] = 50 if step else 10

    options = {"num_steps": 3, "grad_norm_every": 1, "balance_grad_norms": 1.0, "learning_rate": 1e-9}
    _, log = fit_weight(tmp_path, loss_fn, on_step=on_step, **options)
    average = 10.0
    assert log[1]["toy/logits_kd"] == pytest.approx(7.0)
    for step in (2, 3):
        average = 0.7 * average + 0.3 * 50
        assert log[step]["toy/logits_kd"] == pytest.approx(50 / average * 7.0, rel=1e-5)


def test_without_balance_the_parts_stay_as_they_come(tmp_path: Path) -> None:
    _, log = fit_weight(
        tmp_path, lambda weight: {"task_loss": weight.sum(), "logits_kd": 700 * weight.sum()}, grad_norm_every=1
    )
    assert log[1]["toy/logits_kd"] == pytest.approx(4900)
    assert log[1]["toy/grad_norm_logits_kd"] == pytest.approx(700 * 2**0.5)


def test_a_part_without_gradient_is_left_alone(tmp_path: Path) -> None:
    _, log = fit_weight(
        tmp_path,
        lambda weight: {"task_loss": weight.sum(), "logits_kd": 0 * weight.sum()},
        grad_norm_every=1,
        balance_grad_norms=1.0,
    )
    assert log[1]["toy/grad_norm_logits_kd"] == 0.0


@pytest.mark.parametrize("num_parts", [1, 4])
def test_gradient_norms_are_those_of_the_whole_step(tmp_path: Path, num_parts: int) -> None:
    """However it is split: micro-batches differ in length, and the parts in what they divide by."""
    model, teacher = build("qwen3"), build("qwen3", seed=5)
    examples = [Example([5 + i, *range(9, 9 + i)], [20 + i % 2]) for i in range(8)]
    log: dict[str, float] = {}

    def loss_fn(batch: losses.Batch) -> train.LossParts:
        hidden, target = losses.hidden_states(model, batch), losses.hidden_states(teacher, batch).detach()
        logits_kd = losses.logits_kd_loss(model, hidden, teacher, target, batch, kd_temperature=2.0, variant="authors")
        return {"task_loss": losses.task_loss(model, hidden, batch), "logits_kd": logits_kd}

    def gradient_norm(part: str) -> float:
        [batch] = ExampleBatches(examples, batch_size=8, gradient_accumulation=1, seed=3)(0)
        grads = torch.autograd.grad(loss_fn(batch)[part], list(model.parameters()), allow_unused=True)
        return float(torch.stack([grad.square().sum() for grad in grads if grad is not None]).sum().sqrt())

    expected = {part: gradient_norm(part) for part in ("task_loss", "logits_kd")}
    train.fit(
        model,
        ExampleBatches(examples, batch_size=8, gradient_accumulation=num_parts, seed=3),
        loss_fn,
        **{**OPTIONS, "num_steps": 1, "work_dir": tmp_path, "report": lambda metrics, step: log.update(metrics)},
        grad_norm_every=1,
    )
    for part, norm in expected.items():
        assert log[f"toy/grad_norm_{part}"] == pytest.approx(norm, rel=1e-4)


def test_a_step_is_adamw_with_clipping_and_decay_of_matrices_only(tmp_path: Path) -> None:
    def make() -> torch.nn.Linear:
        model = torch.nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[3.0, 4.0], [1e-9, 2.0]]))  # 1e-9: a gradient that eps matters for
            model.bias.copy_(torch.tensor([5.0, -6.0]))
        return model

    def loss_of(model: torch.nn.Linear) -> torch.Tensor:
        return model.weight.square().sum() + (3 * model.bias).square().sum()

    ours, theirs = make(), make()
    options = {**OPTIONS, "weight_decay": 0.3, "adam_beta2": 0.7, "max_grad_norm": 2.0, "schedule": "constant"}
    batch = losses.Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.ones(1), losses.Totals(1, 1, 1))
    train.fit(
        ours,
        lambda step: [batch],
        lambda batch: {"task_loss": loss_of(ours)},
        **{**options, "num_steps": 5, "warmup_ratio": 0.0, "work_dir": tmp_path, "report": lambda metrics, step: None},
    )
    groups = [{"params": [theirs.weight], "weight_decay": 0.3}, {"params": [theirs.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.7), eps=1e-8)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(theirs).backward()
        norm = float(torch.stack([p.grad.square().sum() for p in theirs.parameters()]).sum().sqrt())
        for parameter in theirs.parameters():
            parameter.grad *= min(1.0, 2.0 / norm)
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-5, atol=0)


CURVE = {  # a dense model's, so that no code turns on another processor's rounding
    "float32": [4.68983, 5.64267, 3.4597, 6.13021, 4.82585, 3.8617, 2.84533, 3.11936, 2.14495, 3.54534],
    "bfloat16": [4.69548, 5.68005, 3.47439, 6.14305, 4.86491, 3.85021, 2.86051, 3.13923, 2.12041, 3.5713],
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ten_steps_are_those_of_before(tmp_path: Path, precision: str) -> None:
    log: list[tuple[int, dict[str, float]]] = []
    fit(tmp_path, model=build("qwen3"), num_steps=10, log=log, precision=precision, learning_rate=3e-3)
    curve = [metrics["toy/loss"] for _, metrics in log]
    assert curve == pytest.approx(CURVE[precision], rel=1e-4 if precision == "float32" else 4e-3)
    other = CURVE["bfloat16" if precision == "float32" else "float32"]
    assert curve != pytest.approx(other, rel=4e-3)


def distil(work_dir: Path, **changes: Any) -> Any:
    """The toy task with a second part, balanced, and a quantisation warm-up over all steps."""
    model, teacher = build("qwen3"), build("qwen3", seed=5)
    operate(model, subln="output", sub_norm_eps=1e-6)

    def loss_fn(batch: losses.Batch) -> train.LossParts:
        hidden = losses.hidden_states(model, batch)
        with torch.no_grad():
            target = losses.hidden_states(teacher, batch)
        logits_kd = losses.logits_kd_loss(model, hidden, teacher, target, batch, kd_temperature=2.0, variant="authors")
        return {"task_loss": losses.task_loss(model, hidden, batch), "logits_kd": logits_kd}

    with quantization_warmup(model, 1.0) as on_step:
        options = {"grad_norm_every": 3, "balance_grad_norms": 0.5, "on_step": on_step, **changes}
        return fit(work_dir, model=model, loss_fn=loss_fn, **options)


@pytest.mark.parametrize("schedule", ["linear", "two_stage"])
def test_an_interrupted_run_keeps_its_balance_warm_up_and_schedule(tmp_path: Path, schedule: str) -> None:
    whole = distil(tmp_path / "whole", schedule=schedule)

    class Killed(Exception):
        pass

    def die(metrics: dict[str, float], step: int) -> None:
        if step == 10:
            raise Killed

    with pytest.raises(Killed):
        distil(tmp_path / "part", schedule=schedule, report=die)
    assert [p.name for p in (tmp_path / "part").iterdir()] == ["step-8"]  # 9 is the next measurement
    resumed = distil(tmp_path / "part", schedule=schedule)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert all(module.hardness == 1.0 for module in resumed.modules() if isinstance(module, BitLinear))
    unbalanced = distil(tmp_path / "plain", schedule=schedule, balance_grad_norms=0.0)
    assert not torch.equal(whole.model.norm.weight, unbalanced.model.norm.weight)


def test_every_step_is_announced_before_it_is_made(tmp_path: Path) -> None:
    events: list[Any] = []

    def loss_fn(weight: torch.nn.Parameter) -> train.LossParts:
        events.append("loss")
        return {"task_loss": weight.sum()}

    fit_weight(tmp_path, loss_fn, num_steps=3, on_step=lambda step, num_steps: events.append((step, num_steps)))
    assert events == [(0, 3), "loss", (1, 3), "loss", (2, 3), "loss"]


def test_two_stage_ends_weight_decay_at_the_middle_and_halves_the_rate(tmp_path: Path) -> None:
    weights = []

    def loss_fn(weight: torch.nn.Parameter) -> train.LossParts:
        weights.append(weight.detach().clone())
        return {"task_loss": 0 * weight.sum()}  # decay alone moves the weight

    weight, log = fit_weight(
        tmp_path, loss_fn, num_steps=9, schedule="two_stage", weight_decay=0.5, learning_rate=0.1, warmup_ratio=0.23
    )
    weights.append(weight.detach())
    warmup, middle = 2, 4
    for step in range(9):
        if step < warmup:
            rate = 0.1 * (step + 1) / warmup
        else:
            rate = 0.1 * (1 - (step - warmup) / (9 - warmup)) * (0.5 if step >= middle else 1.0)
        assert log[step + 1]["toy/learning_rate"] == pytest.approx(rate)
        decay = 0.5 if step < middle else 0.0
        assert torch.allclose(weights[step + 1], weights[step] * (1 - rate * decay), rtol=1e-6), step
    assert torch.equal(weights[middle], weights[-1])


def test_other_schedules_decay_to_the_end(tmp_path: Path) -> None:
    weight, _ = fit_weight(tmp_path, lambda weight: {"task_loss": 0 * weight.sum()}, weight_decay=0.5)
    assert torch.allclose(weight.detach(), torch.tensor([[3.0, 4.0]]) * (1 - 0.1 * 0.5) ** 10)


def test_schedules() -> None:
    def factor(step: int, schedule: str) -> float:
        return learning_rate_factor(step, 100, schedule=schedule, warmup_ratio=0.1)

    assert factor(0, "linear") == pytest.approx(0.1)
    assert factor(9, "cosine") == pytest.approx(1.0)
    assert factor(10, "linear") == 1.0
    assert factor(55, "linear") == pytest.approx(0.5)
    assert factor(55, "cosine") == pytest.approx(0.5)
    assert factor(99, "constant") == 1.0
    assert factor(49, "two_stage") == pytest.approx(1 - 39 / 90)
    assert factor(50, "two_stage") == pytest.approx(0.5 * (1 - 40 / 90))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "step.json"])
@pytest.mark.parametrize("damage", ["empty", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    def die(metrics: dict[str, float], step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, report=die)
    file = tmp_path / "step-4" / name
    file.write_bytes(b"") if damage == "empty" else file.unlink()
    with pytest.raises(ValueError, match=r"unreadable training checkpoint path=.*step-4: .*; delete it to begin"):
        fit(tmp_path)
