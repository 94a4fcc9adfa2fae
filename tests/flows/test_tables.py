"""The tables as a Prefect flow, on a real server, at a scale of seconds."""

import fcntl
import json
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.exceptions import ParameterTypeError

from bitdistill_core.manifest import locked
from bitdistill_core.tables import run
from bitdistill_core.tables.plan import read_plan
from bitdistill_core.tables.speed import SPEED, measure_speed
from flows.tables import tables
from tests.conftest import ROOT
from tests.flows.artifacts import artifact


@pytest.fixture
def options(tiny_scale: Path) -> dict[str, Any]:
    return {"profile": "tiny", "plans": tiny_scale, "params_file": ROOT / "params.yaml", "track": False}


@pytest.fixture(scope="module")
def speed(tiny_scale: Path, finished_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measured speed of the base of `finished_tables`: measuring takes longer than the cells do."""
    results = tmp_path_factory.mktemp("speed")
    plan = read_plan(tiny_scale, "tiny", ROOT / "params.yaml")
    assert measure_speed(plan, store=finished_tables / "store", results=results)
    return results / SPEED


@pytest.fixture
def known(stored_stages: Path, speed: Path, tmp_path: Path) -> Path:
    """A folder where stages and speed are found; cells have no results."""
    (tmp_path / "results/tiny").mkdir(parents=True)
    shutil.copy(speed, tmp_path / "results/tiny")
    return tmp_path


def task_states(state: State[Any]) -> dict[str, str]:
    """Name and final state of the task runs of a flow run."""
    with get_client(sync_client=True) as client:
        flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        return {item.name: item.state_name for item in client.read_task_runs(flow_run_filter=flow_run)}


def test_every_cell_is_a_task_run_and_finished_ones_are_found(options: dict[str, Any], tmp_path: Path) -> None:
    state = tables(**options, groups=["table1"], return_state=True)
    assert state.result() == {"finished": 2, "left": 0, "directory": "results/tiny"}
    assert task_states(state) == {
        "small reviews fp16_sft seed=0": "Completed",
        "small reviews bitnet_sft seed=0": "Completed",
    }
    assert float(artifact("cells")) == 100
    readme = (tmp_path / "results/tiny/README.md").read_text()
    assert artifact("tables") == readme
    assert "2 of 3 cells are there" in readme
    assert list(json.loads((tmp_path / "results/tiny" / SPEED).read_text())) == ["small"]

    again = tables(**options, groups=["table1"], return_state=True)
    assert again.result() == state.result()
    assert task_states(again) == {}


@pytest.mark.usefixtures("known")
def test_a_failing_cell_fails_its_task_and_at_last_the_flow(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tables(**options, return_state=True)
    assert state.is_failed()
    assert "1 cells failed, the others are in results/tiny/README.md: small reviews broken seed=0: " in state.message
    assert sorted(task_states(state).values()) == ["Completed", "Completed", "Failed"]
    assert "Traceback" not in caplog.text
    assert "2 of 3 cells are there" in (tmp_path / "results/tiny/README.md").read_text()


def test_a_spent_budget_leaves_cells_and_a_cancelled_task(
    options: dict[str, Any], endless_scale: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        state = tables(**{**options, "plans": endless_scale}, budget_minutes=0.05, groups=["table1"], return_state=True)
    assert state.is_completed()
    assert state.result()["left"] == 2
    assert list(task_states(state).values()) == ["Cancelled"]
    assert "the budget of 0.05 minutes is spent; cells left: 2" in caplog.text


@pytest.mark.usefixtures("known")
def test_a_cell_of_another_process_is_waited_for(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "POLL_SECONDS", 0.5)
    with ExitStack() as other:
        cell = Path("runs/tables/tiny/.work/cell-small-reviews-fp16_sft-seed0")
        other.enter_context(locked(cell, fcntl.LOCK_EX))
        timer = Timer(3.0, other.close)
        timer.start()
        state = tables(**options, groups=["table1"], return_state=True)
        timer.join()
    assert state.result() == {"finished": 2, "left": 0, "directory": "results/tiny"}
    with get_client(sync_client=True) as client:
        flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        states = {item.state_name for item in client.read_task_runs(flow_run_filter=flow_run)}
    assert states == {"Completed"}  # no task run just to see that it is busy
    assert float(artifact("cells")) == 100


def test_a_wrong_parameter_is_one_error_before_any_cell(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown scale=none; "):
        tables(**{**options, "profile": "none"})
    with pytest.raises(ValueError, match="unknown group=table9; the groups are table1, table6"):
        tables(**options, groups=["table9"])
    with pytest.raises(ParameterTypeError, match="greater than or equal to 0"):
        tables(**options, budget_minutes=-1)
    assert not list(tmp_path.iterdir())
