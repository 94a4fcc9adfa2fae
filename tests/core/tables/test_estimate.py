"""What a scale costs, against a sum by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from bitdistill_core.tables.estimate import estimate
from bitdistill_core.tables.plan import Plan
from tests.core.tables.conftest import SCALE

SMALL, LARGE = 1_000_000, 3_000_000
MODELS: dict[str, Any] = {
    "small": {**SCALE["models"]["small"], "num_parameters": SMALL},
    "large": {**SCALE["models"]["large"], "num_parameters": LARGE},
}
TASKS = {"reviews": {**SCALE["tasks"]["reviews"], "num_train_examples": 6000, "tokens_per_example": 50}}
METHODS = {"larger": {"label": "Large", "teacher_model": "large"}}


def group(*methods: str) -> dict[str, Any]:
    return {"table1": {"models": ["small"], "tasks": ["reviews"], "methods": list(methods)}}


def table(text: str) -> dict[str, list[float]]:
    """stage -> runs, tokens, operations in 10^18, hours."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return {name: [float(value) for value in values] for name, *values in lines}


def test_a_stage_that_cells_share_is_counted_once(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(models=MODELS, tasks=TASKS, groups=group("fp16_sft", "ptq", "bitnet_sft", "bitdistill"))
    text = estimate(plan, teraflops=2.0)
    assert text.startswith("A tiny scale: 4 cells, at 2 teraflops a second\n")
    tuned = 0.5 * 64 * 50  # epochs, max_train_examples, tokens each
    operations = {
        "teacher": 6 * SMALL * tuned,
        "pretrain": 6 * SMALL * 1024,  # of BitDistill alone
        "distill": (6 + 6 + 2) * SMALL * tuned,  # one of two has a teacher
    }
    found = table(text)
    assert set(found) == {*operations, "total"}
    for stage, expected in operations.items():
        assert found[stage][2] == pytest.approx(expected / 1e18, rel=0.01), stage
        assert found[stage][3] == pytest.approx(expected / 2e12 / 3600, rel=0.01), stage
    assert [found[stage][0] for stage in (*operations, "total")] == [1, 1, 2, 4]
    assert found["pretrain"][1] == pytest.approx(1024, rel=0.01)
    assert found["total"][2] == pytest.approx(sum(operations.values()) / 1e18, rel=0.01)


def test_a_larger_teacher_costs_its_own_size(make_plan: Callable[..., Plan]) -> None:
    found = table(estimate(make_plan(models=MODELS, tasks=TASKS, methods=METHODS, groups=group("larger"))))
    tuned = 0.5 * 64 * 50
    assert found["teacher"][2] == pytest.approx(6 * LARGE * tuned / 1e18, rel=0.01)
    assert found["distill"][2] == pytest.approx((6 * SMALL + 2 * LARGE) * tuned / 1e18, rel=0.01)
    assert found["pretrain"][2] == pytest.approx(6 * SMALL * 1024 / 1e18, rel=0.01)


@pytest.mark.parametrize(("limit", "held"), [(1_000_000, 64 * 50), (1000, 1000)])
def test_blocks_cost_their_epochs_and_one_pass_of_both_models(
    make_plan: Callable[..., Plan], limit: int, held: int
) -> None:
    kd = {"logits_kd_weight": 0.0, "attention_kd_weight": 0.0}
    blockwise = {"num_epochs": 2, "learning_rate": 1e-3, "num_tokens": limit}
    methods = {"blocks": {"label": "Blocks", "params": {"distill": {**kd, "blockwise": blockwise}}}}
    found = table(estimate(make_plan(models=MODELS, tasks=TASKS, methods=methods, groups=group("blocks"))))
    assert found["distill"][1] == pytest.approx(0.5 * 64 * 50 + 2 * held, rel=0.01)
    operations = 6 * SMALL * (0.5 * 64 * 50 + 2 * held) + (2 + 2) * SMALL * held
    assert found["distill"][2] == pytest.approx(operations / 1e18, rel=0.01)


@pytest.mark.parametrize(
    ("missing", "changes"),
    [
        ("num_parameters of model=small", {"models": SCALE["models"], "tasks": TASKS}),
        ("num_train_examples of task=reviews", {"models": MODELS, "tasks": SCALE["tasks"]}),
        (
            "tokens_per_example of task=reviews",
            {"models": MODELS, "tasks": {"reviews": {**SCALE["tasks"]["reviews"], "num_train_examples": 10}}},
        ),
    ],
)
def test_what_an_estimate_lacks_is_named(make_plan: Callable[..., Plan], missing: str, changes: Any) -> None:
    with pytest.raises(ValueError, match=rf"an estimate needs {missing}; add it to tables/tiny\.yaml"):
        estimate(make_plan(groups=group("fp16_sft"), **changes))
