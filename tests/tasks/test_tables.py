"""Finished cells in MLflow: each a run, never twice, and never in the way."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from bitdistill_core.tables.cell import result_path
from bitdistill_core.tables.plan import Plan, read_plan
from tasks.tables import TablesCopy, run_tables
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
DEAD_SERVER = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(scope="module")
def plan(tiny_scale: Path) -> Plan:
    return read_plan(tiny_scale, "tiny", ROOT / "params.yaml")


@pytest.fixture
def results(finished_tables: Path, tmp_path: Path) -> Path:
    """Results of group table1, made without tracking."""
    return Path(shutil.copytree(finished_tables / "results", tmp_path / "results"))


def runs_of(client: MlflowClient, name: str) -> list[Run]:
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_a_cell_is_one_run_with_what_made_it_and_what_it_reached(
    client: MlflowClient, plan: Plan, results: Path, tmp_path: Path
) -> None:
    cell = plan.find("small", "reviews", "bitnet_sft", 0)
    TablesCopy(plan, results).send_missing([cell])
    (run,) = runs_of(client, tmp_path.name)
    result = json.loads(result_path(results, cell).read_text())
    assert (run.info.run_name, run.info.status) == ("small reviews bitnet_sft seed=0", "FINISHED")
    expected = {"model": "small", "task": "reviews", "method": "bitnet_sft", "seed": "0"}
    assert expected.items() <= run.data.params.items()
    assert run.data.params["surgery.subln"] == "none"
    assert run.data.params["base.scratch.num_layers"] == "2"
    assert not [key for key in run.data.params if key.startswith(("teacher.", "benchmark.", "runtime."))]
    assert run.data.metrics["accuracy"] == result["metrics"]["accuracy"]
    assert run.data.metrics["ci_low"] == result["ci_low"]
    history = client.get_metric_history(run.info.run_id, "distill/loss")
    points = sorted((metric.step, metric.value) for metric in history)
    assert points == [tuple(point) for point in result["curves"]["distill/loss"]]
    assert run.data.tags["bitdistill.recipe"] == result["recipe"]
    assert run.data.tags["bitdistill.groups"] == "table1"


def test_what_was_finished_before_is_sent_once(client: MlflowClient, plan: Plan, results: Path, tmp_path: Path) -> None:
    for _ in range(2):
        outcome = run_tables(plan, store=tmp_path / "store", results=results, groups=["table1"], is_survey=True)
        assert len(outcome.finished) == 2
        assert len(runs_of(client, tmp_path.name)) == 2
    assert not (tmp_path / "store").exists()


def test_a_result_of_other_parameters_is_another_run(
    client: MlflowClient, plan: Plan, results: Path, tmp_path: Path
) -> None:
    cell = plan.find("small", "reviews", "fp16_sft", 0)
    result = json.loads(result_path(results, cell).read_text())
    for recipe in (result["recipe"], "0123456789abcdef"):
        TablesCopy(plan, results).send(cell, {**result, "recipe": recipe})
    assert len(runs_of(client, tmp_path.name)) == 2


def test_an_interrupted_run_is_completed(client: MlflowClient, plan: Plan, results: Path, tmp_path: Path) -> None:
    cells = [plan.find("small", "reviews", "fp16_sft", 0)]
    TablesCopy(plan, results).send_missing(cells)
    (before,) = runs_of(client, tmp_path.name)
    client.update_run(before.info.run_id, status="RUNNING")
    TablesCopy(plan, results).send_missing(cells)
    (after,) = runs_of(client, tmp_path.name)
    assert (after.info.run_id, after.info.status) == (before.info.run_id, "FINISHED")
    for key in after.data.metrics:
        steps = [metric.step for metric in client.get_metric_history(after.info.run_id, key)]
        assert len(set(steps)) == len(steps)


def test_a_dead_server_costs_one_warning_and_no_cell(
    plan: Plan,
    stored_stages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD_SERVER)
    with caplog.at_level(logging.WARNING):
        outcome = run_tables(plan, store=stored_stages, results=tmp_path / "results", groups=["table1"])
    assert len(outcome.finished) == 2
    assert all(result_path(tmp_path / "results", cell).is_file() for cell in outcome.finished)
    assert [record.name for record in caplog.records].count("tasks.tables") == 1
    assert "`bitdistill tables --render-only` sends them later" in caplog.text


def test_cells_go_to_an_experiment_of_their_own(
    plan: Plan, results: Path, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run_tables(plan, store=tmp_path / "store", results=results, groups=["table1"], is_survey=True)
    assert len(runs_of(MlflowClient(store), "bitdistill-tables")) == 2
