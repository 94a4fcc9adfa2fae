"""The training loop: it learns, resumes exactly, and stops at what is not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill_core import losses, train
from bitdistill_core.data import Example, ExampleBatches
from bitdistill_core.schedules import learning_rate_factor
from bitdistill_core.surgery import operate
from tests.core.conftest import build

EXAMPLES = [Example([5 + i % 7, 9, 11], [20 + i % 2]) for i in range(24)]


def fit(
    work_dir: Path, *, num_steps: int = 12, log: list[tuple[int, dict[str, float]]] | None = None, **changes: Any
) -> Any:
    """A student on a toy task, from scratch or from what work_dir holds."""
    model = build("qwen3")
    operate(model, subln="output", sub_norm_eps=1e-6)
    batches = ExampleBatches(EXAMPLES, batch_size=4, gradient_accumulation=2, seed=3)
    options: dict[str, Any] = {
        "name": "toy",
        "num_steps": num_steps,
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
        "work_dir": work_dir,
        "device": torch.device("cpu"),
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


def test_gradient_norms_of_parts_are_reported(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    log: list[dict[str, float]] = []
    model = torch.nn.Module()
    model.weight = weight
    batch = losses.Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.ones(1), losses.Totals(1, 1, 1))
    train.fit(
        model,
        lambda step: [batch],
        lambda batch: {"a": weight.square().sum(), "b": 10 * weight.sum()},
        name="toy",
        num_steps=1,
        seed=0,
        learning_rate=0.1,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        adam_beta2=0.9,
        max_grad_norm=1.0,
        precision="float32",
        report_every=1,
        checkpoint_every=10,
        grad_norm_every=1,
        work_dir=tmp_path,
        device=torch.device("cpu"),
        report=lambda metrics, step: log.append(metrics),
    )
    merged = {name: value for metrics in log for name, value in metrics.items()}
    assert merged["toy/grad_norm_a"] == pytest.approx(10.0)
    assert merged["toy/grad_norm_b"] == pytest.approx(10 * 2**0.5)
    assert merged["toy/loss"] == pytest.approx(25 + 70)


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
