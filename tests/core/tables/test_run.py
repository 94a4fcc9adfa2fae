"""A tiny plan run end to end: results, what is found again, what fails, what a spent budget leaves."""

import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitdistill_core import checkpoint
from bitdistill_core.evaluate import evaluate_split, wilson_interval
from bitdistill_core.manifest import StageBusyError, locked, read_manifest
from bitdistill_core.scorers import TorchScorer
from bitdistill_core.stages.data import examples_path
from bitdistill_core.tables import run
from bitdistill_core.tables.cell import chain, read_result, result_path, run_cell
from bitdistill_core.tables.plan import Cell, Plan
from bitdistill_core.tables.run import Outcome, run_plan
from bitdistill_core.tables.speed import SPEED, measure_speed, speed_rows
from tests.core.tables.conftest import SCALE, tiny_plan

TEACHER, PTQ, STUDENT = (Cell("small", "reviews", method, 0) for method in ("fp16_sft", "ptq", "bitdistill"))
KEYS = {
    "cell", "recipe", "sources", "seconds", "device", "commit", "floors", "split", "num_examples", "metrics", "curves",
    "weights",
}  # fmt: skip


@dataclass
class Folder:
    """Where a plan is run, and what was told."""

    root: Path
    told: list[str] = field(default_factory=list)

    def run(self, plan: Plan, **options: Any) -> Outcome:
        self.told.clear()
        places = {"store": self.root / "store", "results": self.root, "data_root": None}
        return run_plan(plan, tell=self.told.append, **{**places, **options})  # type: ignore[arg-type]

    def result(self, cell: Cell) -> dict[str, Any]:
        return json.loads(result_path(self.root, cell).read_text())

    def stages(self) -> set[str]:
        return {path.parent.name for path in (self.root / "store").glob("*/*") if path.parent.name != ".work"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Folder, Outcome]:
    """The plan run to its end, every checkpoint kept."""
    root = tmp_path_factory.mktemp("tables")
    plan, folder = tiny_plan(root / "tables"), Folder(root)
    return plan, folder, folder.run(plan, keep_checkpoints=True)


def group(*methods: str, **changes: Any) -> dict[str, Any]:
    return {"table1": {"models": ["small"], "tasks": ["reviews"], "methods": list(methods), **changes}}


def test_every_cell_leaves_its_result(finished: tuple[Plan, Folder, Outcome]) -> None:
    plan, folder, outcome = finished
    assert outcome.finished == [TEACHER, PTQ, STUDENT]
    assert not outcome.failed
    assert not outcome.left
    for cell in outcome.finished:
        result = folder.result(cell)
        assert set(result) == KEYS | {"labels", "predictions", "ci_low", "ci_high"}
        assert result["cell"] == {"model": "small", "task": "reviews", "method": cell.method, "seed": 0}
        assert result["recipe"] == chain(plan, cell).recipe
        assert (result["split"], result["num_examples"], result["device"]) == ("test", 16, "cpu")
        right = sum(a == b for a, b in zip(result["labels"], result["predictions"], strict=True))
        assert result["metrics"] == {"accuracy": right / 16}
        assert (result["ci_low"], result["ci_high"]) == wilson_interval(right / 16, 16)
    assert [line.partition(":")[0] for line in folder.told[1::2]] == [
        f"[{number}/3] {cell}" for number, cell in enumerate(outcome.finished, start=1)
    ]


def test_predictions_are_those_of_lm_eval_on_the_stored_model(finished: tuple[Plan, Folder, Outcome]) -> None:
    plan, folder, _ = finished
    last = chain(plan, STUDENT)
    model, tokenizer = checkpoint.load_model(last.directory(folder.root / "store"))
    scorer = TorchScorer(model, tokenizer, batch_size=32, device=torch.device("cpu"))
    examples = examples_path(last.inputs["data"].directory(folder.root / "store"), "test")
    options: dict[str, Any] = {"task": "review_sentiment", "is_generation": False, "split": "test", "max_new_tokens": 4}
    found = evaluate_split(scorer, examples=examples, **options)
    result = folder.result(STUDENT)
    assert [line["prediction"] for line in found.predictions] == result["predictions"]
    assert [line["label"] for line in found.predictions] == result["labels"]


def test_a_teacher_quantised_after_training_keeps_its_weights(finished: tuple[Plan, Folder, Outcome]) -> None:
    plan, folder, _ = finished
    teacher, quantised = (
        checkpoint.load_model(chain(plan, cell).directory(folder.root / "store"))[0] for cell in (TEACHER, PTQ)
    )
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, quantised.get_parameter(name)), name
    assert teacher.config.to_dict().get("bitdistill") is None
    assert quantised.config.bitdistill["subln"] == "none"


def test_results_hold_curves_weights_and_times(finished: tuple[Plan, Folder, Outcome]) -> None:
    plan, folder, _ = finished
    result = folder.result(STUDENT)
    store = folder.root / "store"
    assert set(result["curves"]) == {"teacher/loss", "pretrain/loss", "distill/loss", "distill/task_loss"}
    for name in ("pretrain", "distill"):
        directory = next(s for s in chain(plan, STUDENT).before() if s.name == name).directory(store)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        points = [[line["step"], line[f"{name}/loss"]] for line in lines if f"{name}/loss" in line]
        assert result["curves"][f"{name}/loss"] == points
        assert len(points) == 2
    assert set(result["weights"]) == {"surgery", "pretrain", "distill"}
    assert set(folder.result(PTQ)["weights"]) == {"surgery"}
    assert folder.result(TEACHER)["weights"] == {}
    for summary in result["weights"].values():
        assert len(summary["density"]) == 120
        assert sum(summary["code_shares"]) == pytest.approx(1)
    assert set(result["seconds"]) == {"data", "base", "teacher", "surgery", "pretrain", "distill"}


def test_a_result_of_other_data_or_another_length_is_none(
    finished: tuple[Plan, Folder, Outcome], tmp_path: Path
) -> None:
    plan, folder, _ = finished
    path = result_path(tmp_path, STUDENT)
    path.parent.mkdir(parents=True)
    result = folder.result(STUDENT)
    assert result["sources"]

    def found(**changes: object) -> bool:
        path.write_text(json.dumps({**result, **changes}))
        return read_result(plan, STUDENT, tmp_path) is not None

    assert found()
    assert found(sources={"elsewhere/train.parquet": "0" * 64})  # not here to compare
    assert not found(sources=dict.fromkeys(result["sources"], "0" * 64))
    length = plan.params(STUDENT).evaluate.max_new_tokens
    assert found(max_new_tokens=length)
    assert not found(max_new_tokens=length + 1)
    del result["sources"]  # of an older version
    assert found()


def test_a_second_call_runs_nothing(finished: tuple[Plan, Folder, Outcome]) -> None:
    plan, folder, outcome = finished
    before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*") if path.is_file()}
    ran: list[Cell] = []
    again = folder.run(plan, on_result=lambda cell, result: ran.append(cell))
    assert again.finished == outcome.finished
    assert folder.told == ran == []
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("*") if path.is_file()} == before


def test_the_time_of_two_stages_of_a_name_adds_up(finished: tuple[Plan, Folder, Outcome]) -> None:
    _, folder, _ = finished
    plan = tiny_plan(
        folder.root / "larger",
        methods={"larger": {"label": "Large", "teacher_model": "large"}},
        groups={"figure3c": group("larger")["table1"]},
    )
    cell = replace(STUDENT, method="larger")
    assert folder.run(plan, keep_checkpoints=True).finished == [cell]
    steps = [step for step in chain(plan, cell).before() if step.name == "base"]
    seconds = [read_manifest(step.directory(folder.root / "store"))["seconds"] for step in steps]
    assert len(seconds) == 2
    assert folder.result(cell)["seconds"]["base"] == pytest.approx(sum(seconds))


def test_a_diverging_cell_is_told_and_costs_no_other(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    wild = {"label": "Wild", "params": {"pretrain": {"num_tokens": 0}, "distill": {"learning_rate": 1e30}}}
    plan = make_plan(methods={"wild": wild}, groups=group("wild", "fp16_sft"))
    folder, bad = Folder(tmp_path), replace(STUDENT, method="wild")
    outcome = folder.run(plan)
    assert outcome.finished == [TEACHER]
    assert list(outcome.failed) == [bad]
    assert outcome.failed[bad].startswith("distill diverged at step=2: ")
    assert f"failed: {bad}: {outcome.failed[bad]}" in folder.told
    assert not result_path(tmp_path, bad).exists()
    assert "teacher" in folder.stages()  # the failed one needs it, once its cause is mended
    again = folder.run(plan)  # tries the failed one alone
    assert [line for line in folder.told if line.startswith("[")] == [f"[2/2] {bad}"]
    assert list(again.failed) == [bad]


def test_cells_of_other_processes_are_left_until_they_are_there(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = make_plan(), Folder(tmp_path)
    monkeypatch.setattr(run, "POLL_SECONDS", 0.0)
    busy = {TEACHER: 2, PTQ: 1, STUDENT: 0}  # so many times
    tried: list[Cell] = []

    def run_other(plan: Plan, cell: Cell, **_: Any) -> dict[str, Any]:
        tried.append(cell)
        busy[cell] -= 1
        if busy[cell] >= 0:
            raise StageBusyError("busy")
        return {"metrics": {"accuracy": 0.5}}

    outcome = folder.run(plan, run=run_other)
    # the most valuable cell is tried first each time
    assert tried == [TEACHER, PTQ, STUDENT, TEACHER, PTQ, TEACHER]
    assert outcome.finished == [STUDENT, PTQ, TEACHER]
    assert not outcome.failed
    assert not outcome.left

    busy = {TEACHER: 3, PTQ: 3, STUDENT: 3}
    folder.run(plan, run=run_other)
    assert [line for line in folder.told if "other processes" in line] == [
        "other processes work on what is left, or on what it needs: 3 cells; waiting"
    ]


def test_a_cell_is_run_by_one_process(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    lock = tmp_path / "store/.work/cell-small-reviews-fp16_sft-seed0"
    with locked(lock, fcntl.LOCK_EX), pytest.raises(StageBusyError, match="cell-small-reviews-fp16_sft-seed0"):
        run_cell(make_plan(), TEACHER, store=tmp_path / "store", results=tmp_path, data_root=None)
    assert not (tmp_path / "cells").exists()


def test_layers_that_a_larger_teacher_lacks_are_refused_before_training(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    layers = {"distill_layers": [0], "teacher_layers": [9]}
    taught = {"label": "Taught", "teacher_model": "large", "params": {"distill": layers}}
    folder, cell = Folder(tmp_path), replace(STUDENT, method="taught")
    outcome = folder.run(make_plan(methods={"taught": taught}, groups=group("taught")))
    assert outcome.failed[cell] == "distill.teacher_layers must name layers of a model with num_layers=2; got 9"
    assert folder.stages() == {"data", "base"}


def test_a_spent_budget_stops_and_the_same_call_goes_on(
    finished: tuple[Plan, Folder, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = finished
    often = {name: {**SCALE["params"][name], "checkpoint_every": 1} for name in ("pretrain", "teacher", "distill")}
    plan, folder = tiny_plan(tmp_path / "tables", params={**SCALE["params"], **often}), Folder(tmp_path)
    seconds = iter(range(10**9))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))  # a second a look
    outcomes = [folder.run(plan, budget_minutes=0.0)]
    assert outcomes[0].left == [TEACHER, PTQ, STUDENT]
    assert folder.told[-1] == "the budget of 0.0 minutes is spent; cells left: 3"
    assert not (tmp_path / "store").exists()
    while outcomes[-1].left and len(outcomes) < 40:
        outcomes.append(folder.run(plan, budget_minutes=5 / 60))
    assert len(outcomes) > 4
    assert outcomes[-1].finished == [TEACHER, PTQ, STUDENT]
    assert not any(outcome.failed for outcome in outcomes)
    for cell in outcomes[-1].finished:
        resumed, at_once = folder.result(cell), whole.result(cell)
        for key in ("recipe", "predictions", "metrics", "weights"):
            assert resumed[key] == at_once[key], key
        assert resumed["curves"] == at_once["curves"]


def test_discarded_checkpoints_leave_finished_cells_finished(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan, folder = make_plan(), Folder(tmp_path)
    seen: dict[str, set[str]] = {}
    outcome = folder.run(plan, on_result=lambda cell, result: seen.update({cell.method: folder.stages()}))
    assert seen["fp16_sft"] == {"data", "base", "teacher"}
    assert seen["bitdistill"] == {"data", "base", "teacher", "surgery", "pretrain", "distill"}
    assert folder.stages() == {"data", "base"}
    assert folder.run(plan).finished == outcome.finished
    assert folder.told == []


def test_a_cell_leaves_what_other_groups_or_no_group_need(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    others = {"table1": group("fp16_sft")["table1"], "table6": group("ptq")["table1"]}
    folder = Folder(tmp_path)
    folder.run(make_plan(groups=others), groups=["table1"])
    assert folder.stages() == {"data", "base", "teacher"}  # of the cell in table6
    alone = make_plan(groups={"table1": others["table1"]})
    folder.run(alone, cells=[PTQ])  # in no group
    assert folder.stages() == {"data", "base", "teacher", "surgery"}


def test_groups_are_run_alone(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    table1, table6 = group("fp16_sft")["table1"], group("ptq")["table1"]
    plan, folder = make_plan(groups={"table1": table1, "table6": table6}), Folder(tmp_path)
    assert folder.run(plan, groups=["table6"]).finished == [PTQ]
    assert not result_path(tmp_path, TEACHER).exists()
    with pytest.raises(ValueError, match="unknown group=table5; the groups are table1, table6"):
        folder.run(plan, groups=["table5"])


def test_speed_is_that_of_the_packed_base_beside_the_dense_one(
    finished: tuple[Plan, Folder, Outcome], tmp_path: Path
) -> None:
    plan, folder, _ = finished
    measure_speed(plan, store=folder.root / "store", results=tmp_path)
    measured = json.loads((tmp_path / SPEED).read_text())
    assert list(measured) == ["small"]
    dense, packed = speed_rows(measured)
    assert dense[:2] == ["small", "PyTorch float32"]
    assert (dense[4], dense[5]) == ("1.0", "1.0")
    assert packed[1].startswith("BitDistill ")
    assert float(packed[6]) < float(dense[6])  # the file
    assert measure_speed(plan, store=tmp_path / "empty", results=tmp_path) == measured  # not again
    assert measure_speed(plan, store=tmp_path / "empty", results=tmp_path / "other") == {}  # no base yet
    old = {"small": {**measured["small"], "made_from": {**measured["small"]["made_from"], "format": "0"}}}
    (tmp_path / SPEED).write_text(json.dumps(old))
    assert measure_speed(plan, store=tmp_path / "empty", results=tmp_path) == old  # nothing to measure it on
    again = measure_speed(plan, store=folder.root / "store", results=tmp_path)
    assert again["small"]["made_from"] == measured["small"]["made_from"]
