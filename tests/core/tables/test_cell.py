"""The recipes of cells: what they share, what makes them stale and what does not; results on disk."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bitdistill_core.stages import distill
from bitdistill_core.tables.cell import Step, chain, discard_checkpoints, read_result, result_path
from bitdistill_core.tables.plan import Cell, Plan
from tests.core.tables.conftest import SCALE

BITDISTILL = Cell("small", "reviews", "bitdistill", 0)
BITNET_SFT = Cell("small", "reviews", "bitnet_sft", 0)
FP16_SFT = Cell("small", "reviews", "fp16_sft", 0)
PTQ = Cell("small", "reviews", "ptq", 0)
IGNORED = {"data_root", "report_every", "checkpoint_every"}
TWO_TASKS = {**SCALE["tasks"], "sst2": {"label": "SST-2", "params": {"data": {"task": "sst2"}}}}


def recipes(plan: Plan, cell: Cell, **options: Any) -> dict[str, str]:
    """Stage -> recipe; with two stages of a name, the later."""
    return {step.name: step.recipe for step in chain(plan, cell, **options).before()}


def changed(plan: Plan, **sections: dict[str, Any]) -> Plan:
    """The plan with other parameters for every cell."""
    values = {**plan.scale.params}
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return replace(plan, scale=plan.scale.model_copy(update={"params": values}))


def variants(config: BaseModel) -> Iterator[tuple[str, BaseModel]]:
    """The section with one field changed, for every field."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            if getattr(value, "num_epochs", 1) == 0:  # off: nothing in it counts before it is on
                value = value.model_copy(update={"num_epochs": 1})
            yield from ((f"{name}.{k}", config.model_copy(update={name: other})) for k, other in variants(value))
        elif isinstance(value, list):
            yield name, config.model_copy(update={name: [*value, 3]})
        elif isinstance(value, int | float):
            yield name, config.model_copy(update={name: value + 1})
        else:
            yield name, config.model_copy(update={name: f"{value} changed"})


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # values of other types than the section's
def test_every_field_but_the_machines_changes_the_recipe(make_plan: Callable[..., Plan]) -> None:
    for step in chain(make_plan(), BITDISTILL).before():
        same = {name for name, config in variants(step.config) if replace(step, config=config).recipe == step.recipe}
        assert {name.rpartition(".")[2] for name in same} <= IGNORED, step.name
        assert IGNORED & set(type(step.config).model_fields) <= same, step.name
        assert step.name != "base" or {"scratch.report_every", "scratch.checkpoint_every"} <= same


def test_what_a_section_that_is_off_says_is_no_part_of_a_recipe(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    off = changed(plan, distill={"blockwise": {"num_epochs": 0, "learning_rate": 0.5}})
    on = changed(plan, distill={"blockwise": {"num_epochs": 1, "learning_rate": 0.5}})
    assert recipes(plan, BITDISTILL) == recipes(off, BITDISTILL) != recipes(on, BITDISTILL)


def test_a_pretrained_base_does_not_depend_on_what_would_be_trained_from_nothing(
    make_plan: Callable[..., Plan],
) -> None:
    plan, other = make_plan(), {"hidden_size": 48}
    assert recipes(plan, FP16_SFT) != recipes(changed(plan, base={"scratch": other}), FP16_SFT)
    pretrained = changed(plan, base={"checkpoint": "a/model"})
    assert recipes(pretrained, FP16_SFT) == recipes(changed(pretrained, base={"scratch": other}), FP16_SFT)


def test_what_comes_before_is_part_of_a_recipe(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    before, after = recipes(plan, BITDISTILL), recipes(changed(plan, surgery={"subln": "all"}), BITDISTILL)
    assert {name for name in before if before[name] != after[name]} == {"surgery", "pretrain", "distill"}
    after = recipes(changed(plan, base={"scratch": {"seed": 1}}), BITDISTILL)
    assert {name for name in before if before[name] == after[name]} == {"data"}


def test_place_of_the_data_and_of_reports_change_nothing(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    other = changed(plan, distill={"report_every": 7, "checkpoint_every": 9}, runtime={"num_threads": 3})
    assert chain(plan, BITDISTILL).recipe == chain(other, BITDISTILL, data_root="/mirror").recipe


def test_a_new_option_that_is_off_keeps_old_results(make_plan: Callable[..., Plan]) -> None:
    class Old(BaseModel):
        rate: float
        nested: dict[str, int]

    class New(Old):
        balance: float
        extra: str
        layers: list[int]
        root: str | None

    def recipe(**values: Any) -> str:
        off = {"rate": 0.5, "nested": {"depth": 3, "width": 0}, "balance": 0.0, "extra": "none", "layers": []}
        return Step("distill", distill, New(**{**off, "root": None, **values})).recipe

    old = Step("distill", distill, Old(rate=0.5, nested={"depth": 3})).recipe
    assert recipe() == old
    switched = ({"balance": 0.1}, {"extra": "on"}, {"layers": [0]}, {"root": ""}, {"nested": {"depth": 3, "width": 1}})
    assert len({old, *(recipe(**values) for values in switched)}) == 6


def test_base_and_pretraining_are_shared_between_tasks_and_seeds(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(tasks=TWO_TASKS)
    first = recipes(plan, BITDISTILL)
    other_task, other_seed = recipes(plan, replace(BITDISTILL, task="sst2")), recipes(plan, replace(BITDISTILL, seed=1))
    for name in ("base", "surgery", "pretrain"):
        assert first[name] == other_task[name] == other_seed[name]
    for name in ("teacher", "distill"):
        assert len({first[name], other_task[name], other_seed[name]}) == 3
    assert first["data"] == other_seed["data"] != other_task["data"]


def test_calibration_on_examples_makes_surgery_the_tasks_own(make_plan: Callable[..., Plan]) -> None:
    plan = changed(make_plan(tasks=TWO_TASKS), surgery={"initializer": "gptq", "calibration": "examples"})
    first, other = recipes(plan, BITDISTILL), recipes(plan, replace(BITDISTILL, task="sst2"))
    assert first["base"] == other["base"]
    assert first["surgery"] != other["surgery"]


def test_methods_share_their_teacher_and_base(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    assert recipes(plan, BITDISTILL)["teacher"] == recipes(plan, FP16_SFT)["teacher"] == recipes(plan, PTQ)["teacher"]
    assert recipes(plan, BITDISTILL)["base"] == recipes(plan, BITNET_SFT)["base"]
    assert chain(plan, FP16_SFT).name == "teacher"
    assert chain(plan, PTQ).name == "surgery"
    assert chain(plan, PTQ).inputs["model"].name == "teacher"


def test_a_cell_without_distillation_does_not_depend_on_the_teacher(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    other = changed(plan, teacher={"learning_rate": 0.5})
    assert chain(plan, BITNET_SFT).recipe == chain(other, BITNET_SFT).recipe
    assert "teacher" not in recipes(plan, BITNET_SFT)
    assert chain(plan, BITDISTILL).recipe != chain(other, BITDISTILL).recipe
    hidden = changed(plan, distill={"hidden_kd_weight": 1.0})
    assert "teacher" in recipes(hidden, BITNET_SFT)  # block outputs need one


def test_a_larger_teacher_is_made_of_its_own_base(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(methods={"larger": {"label": "Large", "teacher_model": "large"}})
    steps = chain(plan, replace(BITDISTILL, method="larger")).before()
    large = chain(plan, replace(FP16_SFT, model="large"))
    assert large.recipe in {step.recipe for step in steps}
    assert [step.name for step in steps].count("base") == 2
    own = recipes(plan, BITDISTILL)
    assert {own["base"], own["pretrain"]} <= {step.recipe for step in steps}


def test_steps_come_after_what_they_need_and_once(make_plan: Callable[..., Plan]) -> None:
    steps = chain(make_plan(), BITDISTILL).before()
    assert [step.name for step in steps] == ["data", "base", "surgery", "pretrain", "teacher", "distill"]
    done: set[str] = set()
    for step in steps:
        assert {source.recipe for source in step.inputs.values()} <= done
        done.add(step.recipe)


def test_a_result_of_another_recipe_is_none(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan()
    last, path = chain(plan, BITDISTILL), result_path(tmp_path, BITDISTILL)
    assert path == tmp_path / "cells/small/reviews/bitdistill/seed0.json"
    assert read_result(plan, BITDISTILL, tmp_path) is None
    path.parent.mkdir(parents=True)
    path.write_text(f'{{"recipe": "{last.recipe}", "metrics": {{}}}}')
    assert read_result(plan, BITDISTILL, tmp_path) == {"recipe": last.recipe, "metrics": {}}
    assert read_result(changed(plan, distill={"seed": 5}), BITDISTILL, tmp_path) is not None
    assert read_result(changed(plan, distill={"loss": "paper"}), BITDISTILL, tmp_path) is None
    path.write_text('{"recipe"')
    with pytest.raises(ValueError, match=r"unreadable result path=.*seed0\.json; delete it and run the cell again"):
        read_result(plan, BITDISTILL, tmp_path)


def test_models_that_a_pending_cell_needs_are_kept(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan()
    for step in chain(plan, BITDISTILL).before():
        step.directory(tmp_path).mkdir(parents=True)
    discard_checkpoints(plan, tmp_path, [BITDISTILL], [PTQ])
    left = {step.name for step in chain(plan, BITDISTILL).before() if step.directory(tmp_path).is_dir()}
    assert left == {"data", "base", "teacher"}
    discard_checkpoints(plan, tmp_path, [BITDISTILL, PTQ], [])
    left = {step.name for step in chain(plan, BITDISTILL).before() if step.directory(tmp_path).is_dir()}
    assert left == {"data", "base"}
