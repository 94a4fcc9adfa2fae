"""Plans: which cells there are, in which order, with which parameters, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitdistill_core.tables.plan import Cell, Plan, list_scales, read_plan
from tests.conftest import ROOT
from tests.core.tables.conftest import METHODS, write_scale, write_yaml

ONE = {"models": ["small"], "tasks": ["reviews"], "methods": ["fp16_sft"]}
TABLES = ROOT / "tables"


@pytest.mark.parametrize("scale", list_scales(TABLES))
def test_every_scale_of_the_project_reads(scale: str) -> None:
    plan = read_plan(TABLES, scale, ROOT / "params.yaml")
    assert plan.cells()
    assert len(set(plan.cells())) == len(plan.cells())


def test_cells_are_every_combination_of_their_group(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(
        groups={"table1": {"models": ["small", "large"], "tasks": ["reviews"], "methods": ["fp16_sft", "ptq"]}}
    )
    assert plan.cells() == [
        Cell(model, "reviews", method, 0) for model in ("small", "large") for method in ("fp16_sft", "ptq")
    ]


def test_a_cell_of_two_groups_is_run_once_and_first_seeds_come_first(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(
        seeds=[3, 1],
        groups={
            "table1": {**ONE, "methods": ["fp16_sft", "bitdistill"]},
            "table5": {**ONE, "methods": ["bitdistill", "bitnet_sft"]},
            "options": {**ONE, "methods": ["ptq"], "seeds": [3]},
        },
    )
    methods = ["fp16_sft", "bitdistill", "bitnet_sft"]
    expected = [("fp16_sft", 3), ("bitdistill", 3), ("bitnet_sft", 3), ("ptq", 3), *((name, 1) for name in methods)]
    assert [(cell.method, cell.seed) for cell in plan.cells()] == expected
    assert [cell.method for cell in plan.cells(["table5"])] == ["bitdistill", "bitnet_sft"] * 2
    assert plan.cells(["options", "table1"]) == [c for c in plan.cells() if c.method != "bitnet_sft"]


def test_a_cell_has_its_name_and_place() -> None:
    cell = Cell("small", "reviews", "ptq", 2)
    assert str(cell) == "small reviews ptq seed=2"
    assert cell.path == Path("small/reviews/ptq/seed2.json")


def test_parameters_come_from_scale_then_model_then_task_then_method(make_plan: Callable[..., Plan]) -> None:
    def rates(**values: float) -> dict[str, Any]:
        return {"params": {"distill": {f"{key}_kd_weight": value for key, value in values.items()}}}

    plan = make_plan(
        params={"distill": {"kd_temperature": 2.0, **rates(logits=1, attention=1, hidden=1)["params"]["distill"]}},
        models={"small": {"label": "Small", **rates(logits=2, attention=2, hidden=2)}},
        tasks={"reviews": {"label": "Reviews", **rates(attention=3, hidden=3)}},
        methods={"bitdistill": {"label": "x", **rates(hidden=4)}},
        groups={"table1": {**ONE, "methods": ["bitdistill"]}},
    )
    distill = plan.params(Cell("small", "reviews", "bitdistill", 7)).distill
    assert distill.kd_temperature == 2
    assert (distill.logits_kd_weight, distill.attention_kd_weight, distill.hidden_kd_weight) == (2, 3, 4)
    assert distill.learning_rate == 1e-3  # params.yaml


def test_the_seed_is_that_of_fine_tuning_and_distillation_alone(make_plan: Callable[..., Plan]) -> None:
    params = make_plan().params(Cell("small", "reviews", "bitdistill", 7), data_root="/mirror")
    assert (params.teacher.seed, params.distill.seed) == (7, 7)
    assert (params.base.scratch.seed, params.pretrain.seed, params.surgery.seed) == (0, 0, 0)
    assert params.data.data_root == "/mirror"


def test_a_method_of_the_scale_replaces_one_of_the_same_name(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(methods={"bitdistill": {"label": "other", "result": "ptq"}})
    assert plan.methods["bitdistill"].result == "ptq"
    assert plan.methods["fp16_sft"].label == METHODS["fp16_sft"]["label"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": {"table9": ONE}},
            r"unknown group=table9 in scale=tiny; the groups are table1, .*options; another one needs a title",
        ),
        (
            {"groups": {"table1": {**ONE, "models": ["huge"]}}},
            r"names an unknown entry of models: huge; there are small",
        ),
        ({"groups": {"table1": {**ONE, "tasks": ["sst2"]}}}, r"unknown entry of tasks: sst2; there are reviews"),
        ({"groups": {"table1": {**ONE, "methods": ["bitdistil"]}}}, r"of methods: bitdistil; there are fp16_sft, "),
        ({"groups": {"table1": {**ONE, "title": ""}}}, r"groups\.table1\.title: .*at least 1 character"),
        ({"groups": {"../table1": ONE}}, r"groups\.\.\./table1.*should match pattern .*got '\.\./table1'"),
        ({"methods": {"a/b": {"label": "x"}}}, r"methods\.a/b.*should match pattern .*got 'a/b'"),
        ({"groups": {"table1": {**ONE, "methods": []}}}, r"groups\.table1\.methods: .*at least 1 item"),
        ({"seeds": []}, r"seeds: .*at least 1 item"),
        ({"seed": 3}, r"seed: unknown key"),
        ({"params": {"distil": {}}}, r"cell small reviews fp16_sft seed=0: invalid parameters: distil: unknown key"),
        ({"params": {"distill": {"lr": 1}}}, r"cell small .*: invalid parameters: distill\.lr: unknown key"),
        ({"seeds": [-1]}, r"cell small reviews fp16_sft seed=-1: .*teacher\.seed: .*greater than or equal to 0"),
        (
            {
                "methods": {"larger": {"label": "x", "teacher_model": "huge"}},
                "groups": {"table1": {**ONE, "methods": ["larger"]}},
            },
            r"method=larger has an unknown teacher_model=huge",
        ),
        (
            {"methods": {"x": {"label": "x", "result": "teachers"}}},
            r"methods\.x\.result: .*'teacher', 'ptq' or 'student'",
        ),
    ],
)
def test_a_wrong_plan_is_one_clear_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_scale(tmp_path / "tables", **changes)
    with pytest.raises(ValueError, match=message):
        read_plan(folder, "tiny", ROOT / "params.yaml")


def test_an_unknown_scale_names_those_there_are(tmp_path: Path) -> None:
    folder = write_scale(tmp_path / "tables")
    write_yaml(folder / "another.yaml", {})
    assert list_scales(folder) == ["another", "tiny"]
    with pytest.raises(ValueError, match=r"unknown scale=gpu; .*tables defines another, tiny"):
        read_plan(folder, "gpu", ROOT / "params.yaml")
    with pytest.raises(ValueError, match=r"unknown scale=gpu; .*none defines none"):
        read_plan(tmp_path / "none", "gpu", ROOT / "params.yaml")


def test_a_group_that_the_scale_has_not_is_refused(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    for name in ("table6", "tabel1"):
        with pytest.raises(ValueError, match=rf"unknown group={name}; the groups are table1"):
            plan.cells(["table1", name])


def test_a_group_of_another_name_has_a_title(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(groups={"table1": ONE, "more": {**ONE, "title": "More"}, "table5": {**ONE, "title": "Stages"}})
    assert [plan.title(name) for name in plan.scale.groups] == ["Table 1: text classification", "More", "Stages"]
