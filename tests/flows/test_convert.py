"""The conversion as a Prefect flow, on a real server, with the core doing real work."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ParameterTypeError

from bitdistill_core.params import load_params
from bitdistill_core.pipeline import NODES
from flows.convert import convert, override_strings
from tests.command_line import run
from tests.conftest import ROOT
from tests.flows.artifacts import artifact

PARAMS = ROOT / "params.yaml"


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "runs/demo"))


@pytest.mark.slow
def test_a_conversion_runs_every_stage_and_records_it(
    tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = convert(overrides=tiny_overrides, params_file=PARAMS, seed=3)
    run_dir = Path(result["run_dir"])
    assert run_dir == Path("runs/demo-seed3")
    assert all((node.directory(run_dir) / "manifest.json").is_file() for node in NODES)
    assert json.loads((run_dir / "distill/manifest.json").read_text())["config"]["seed"] == 3
    assert Path(result["report"]).is_file()
    assert 0 <= result["bitdistill/accuracy"] <= 1
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bitdistill")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(["demo-seed3", *(node.name for node in NODES)])
    assert {run.info.status for run in runs} == {"FINISHED"}
    parent = next(run for run in runs if run.info.run_name == "demo-seed3")
    with get_client(sync_client=True) as prefect:
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[parent.data.tags["prefect.flow_run_id"]]))
        task_runs = prefect.read_task_runs(flow_run_filter=wanted)
        assert [run.name for run in prefect.read_flow_runs(flow_run_filter=wanted)] == ["demo-seed3"]
    assert sorted(run.name for run in task_runs) == sorted(node.name for node in NODES)
    assert (tmp_path / "mlartifacts").is_dir()

    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = convert(overrides=tiny_overrides, params_file=PARAMS, seed=3)
    assert again == result
    assert caplog.text.count(": up to date") == len(NODES)
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)


def test_the_command_of_a_conversion_ends_with_its_results_as_json(run_dir: Path, tiny_overrides: list[str]) -> None:
    sets = [part for override in tiny_overrides for part in ("--set", override)]
    code, out, error = run("convert", "--params", str(PARAMS), "--no-track", *sets)
    assert code == 0, error
    result = json.loads(out.splitlines()[-1])
    assert result["run_dir"] == "runs/demo"
    rows = {row["method"]: row for row in json.loads((run_dir / "report/results.json").read_text())["rows"]}
    assert result["bitdistill/accuracy"] == rows["bitdistill"]["accuracy"]
    assert error.splitlines()[-1] == "report: runs/demo/report/index.html"


def test_artifacts_show_progress_results_and_report(run_dir: Path, tiny_overrides: list[str]) -> None:
    convert(overrides=tiny_overrides, params_file=PARAMS, track=False)
    assert float(artifact("stages")) == 100
    table = artifact("results")
    assert all(f"| {method} |" in table for method in ("fp16_sft", "bitnet_sft", "bitdistill"))
    assert (run_dir / "report/index.html").as_uri() in artifact("report")


def test_a_wrong_key_is_one_error_before_any_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key in override 'distill\.nonsense=1'"):
        convert(overrides=["distill.nonsense=1"], params_file=PARAMS)
    with pytest.raises(ValueError, match="unknown profile=nowhere; the profiles are demo"):
        convert(profile="nowhere", params_file=PARAMS)
    assert not list(tmp_path.iterdir())


def test_prefect_rejects_parameters_of_the_wrong_type() -> None:
    with pytest.raises(ParameterTypeError, match="seed"):
        convert(seed="abc", params_file=PARAMS)  # type: ignore[arg-type]
    with pytest.raises(ParameterTypeError, match="greater than or equal to 0"):
        convert(seed=-1, params_file=PARAMS)


def test_a_failing_stage_fails_the_flow_with_its_own_message(
    run_dir: Path, tiny_overrides: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = convert(
        overrides=[*tiny_overrides, "distill.num_relation_heads=7"], params_file=PARAMS, track=False, return_state=True
    )
    assert state.is_failed()
    assert "distill.num_relation_heads must divide the query width" in str(state.message)
    assert "Traceback" not in caplog.text
    assert (run_dir / "teacher/manifest.json").is_file()


def test_data_root_and_mappings_are_shorthand_for_overrides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_root=.*/empty holds no data for .*reviews\.parquet"):
        convert(data_root=str(tmp_path / "empty"), params_file=PARAMS, track=False)
    nested = {"distill": {"kd_temperature": 2.0}, "data.data_root": None, "distill.distill_layers": [-1]}
    assert override_strings(nested) == [
        "distill.kd_temperature=2.0",
        "data.data_root=null",
        "distill.distill_layers=[-1]",
    ]
    assert override_strings(None) == []
    title = {"report.title": "Reviews \U0001f3ac"}  # JSON would escape it as two halves, which YAML keeps apart
    assert load_params(PARAMS, overrides=override_strings(title)).report.title == title["report.title"]
    template = {"kind": "classification", "prompt": "{text}"}
    assert override_strings({"data": {"task": "custom", "template": template}}) == [
        'data.task="custom"',
        f"data.template={json.dumps(template)}",
    ]


def test_the_flow_is_typed_for_the_server() -> None:
    assert isinstance(convert, Flow)
    properties = convert.parameters.properties
    assert properties["seed"]["anyOf"] == [{"minimum": 0, "type": "integer"}, {"type": "null"}]
    assert properties["track"]["type"] == "boolean"
