"""MLflow is a copy of the files: complete, never twice, and never in the way."""

import fcntl
import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from bitdistill_core.config import DataConfig, Params
from bitdistill_core.engine.model import Engine
from bitdistill_core.manifest import StageBusyError, digest_file, read_manifest
from bitdistill_core.pipeline import NODES, find_node
from tasks import mlflow_runs, run_files, tracking
from tasks.packed_model import MAX_NEW_TOKENS

pytestmark = pytest.mark.filterwarnings("ignore")
DEAD_SERVER = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "runs/demo"))


def runs_of(client: MlflowClient, tmp_path: Path) -> dict[str, Run]:
    """Run name to run; a test fails if two have one name."""
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def steps_of(client: MlflowClient, run: Run, key: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run.info.run_id, key))


def test_a_sent_run_is_whole(client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path) -> None:
    sent = tracking.send(run_dir, tiny_params)
    assert sent["stages"] == len(NODES)
    runs = runs_of(client, tmp_path)
    assert set(runs) == {"demo", *(node.name for node in NODES)}
    parent, distill = runs["demo"], runs["distill"]
    assert sent["run_id"] == parent.info.run_id
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert distill.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert distill.data.tags["bitdistill.fingerprint"] == read_manifest(run_dir / "distill")["fingerprint"]
    assert parent.data.params["distill.kd_temperature"] == "5.0"
    assert parent.data.params["base.scratch.num_layers"] == "2"
    assert parent.data.tags["bitdistill.profile"] == "demo"
    assert parent.data.tags["bitdistill.task"] == "review_sentiment"
    results = json.loads((run_dir / "report/results.json").read_text())
    accuracy = {row["method"]: row["accuracy"] for row in results["rows"]}
    assert parent.data.metrics["bitdistill/accuracy"] == accuracy["bitdistill"]


def test_metrics_and_times_are_those_of_the_files(
    client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path
) -> None:
    tracking.send(run_dir, tiny_params)
    runs = runs_of(client, tmp_path)
    lines = [json.loads(line) for line in (run_dir / "distill/metrics.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["distill/loss"]) for line in lines if "distill/loss" in line]
    history = client.get_metric_history(runs["distill"].info.run_id, "distill/loss")
    assert [(metric.step, metric.value) for metric in sorted(history, key=lambda m: m.step)] == expected
    first = next(line for line in lines if "distill/loss" in line)
    assert min(metric.timestamp for metric in history) == int(first["time"] * 1000)
    manifest = read_manifest(run_dir / "data")
    assert runs["demo"].info.start_time == int(manifest["started"] * 1000)
    assert runs["data"].info.end_time == int((manifest["started"] + manifest["seconds"]) * 1000)


def test_data_sets_and_report_are_recorded(
    client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path
) -> None:
    tracking.send(run_dir, tiny_params)
    parent = runs_of(client, tmp_path)["demo"]
    contexts = {item.dataset.name: item.tags[0].value for item in parent.inputs.dataset_inputs}
    assert contexts == {
        "review_sentiment train": "training",
        "review_sentiment test": "evaluation",
        "review_sentiment validation": "evaluation",
    }
    files = {item.path for item in client.list_artifacts(parent.info.run_id, "report")}
    assert {"report/index.html", "report/report.md", "report/results.json"} <= files


def test_parameters_hold_no_path_of_this_machine(
    client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path
) -> None:
    assert tiny_params.data.examples.startswith("/")
    tracking.send(run_dir, tiny_params)
    for run in runs_of(client, tmp_path).values():
        assert not [value for value in run.data.params.values() if value.startswith(("/", "~"))]
        assert all(not item.dataset.source.startswith("/") for item in run.inputs.dataset_inputs)


def test_the_packed_model_is_registered_and_predicts(client: MlflowClient, run_dir: Path, tiny_params: Params) -> None:
    tracking.send(run_dir, tiny_params, profile="tiny")
    assert client.get_model_version_by_alias("bitdistill-tiny", "champion").status == "READY"
    model = mlflow.pyfunc.load_model("models:/bitdistill-tiny@champion")
    predicted = model.predict(pd.DataFrame({"text": ["A fine film .", "Dull ."]}))
    engine = Engine.load(run_dir / "pack/bitdistill/model.bitdistill")
    prompts = ["Review: A fine film .\nSentiment:", "Review: Dull .\nSentiment:"]
    best = engine.score(prompts, [" negative", " positive"]).argmax(axis=1)
    assert predicted["label"].tolist() == [["negative", "positive"][index] for index in best]


def test_a_summariser_takes_the_number_of_new_tokens(
    client: MlflowClient, run_dir: Path, tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tiny_params.data.resolved_template.model_copy(update={"kind": "generation"})
    monkeypatch.setattr(DataConfig, "resolved_template", template)
    tracking.send(run_dir, tiny_params, profile="summaries")
    info = mlflow.models.get_model_info("models:/bitdistill-summaries@champion")
    assert info.signature.params.to_dict() == [
        {"name": "max_new_tokens", "type": "long", "default": MAX_NEW_TOKENS, "shape": None}
    ]


def test_two_processes_may_make_the_experiment_at_once(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_first(self: MlflowClient, name: str, **options: Any) -> str:
        create(self, name, **options)
        return create(self, name, **options)

    create = MlflowClient.create_experiment
    monkeypatch.setattr(MlflowClient, "create_experiment", other_first)
    assert mlflow_runs.connect("unused")[1].name == tmp_path.name


def test_the_champion_is_the_best_so_far_on_the_same_examples(
    client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def manifest_of(instead_of: Path, manifest: dict[str, Any], directory: Path) -> dict[str, Any]:
        return manifest if directory == instead_of else run_files.read_unchecked(directory)

    path = "report/results.json"
    results = json.loads((run_dir / path).read_text())
    champions = []
    runs = [("first", 0.7, ""), ("worse", 0.6, ""), ("better", 0.8, ""), ("equal", 0.8, "")]
    runs.append(("other examples", 0.9, "x"))
    for name, score, examples in runs:
        copy = Path(shutil.copytree(run_dir, tmp_path / "runs" / name))
        results["splits"][results["headline_split"]]["bitdistill_packed"]["metrics"]["accuracy"] = score
        (copy / path).write_text(json.dumps(results))
        manifest = read_manifest(run_dir / "report") | {"fingerprint": name}
        manifest["outputs"]["results.json"] = digest_file(copy / path)
        (copy / "report/manifest.json").write_text(json.dumps(manifest))
        data = json.loads((copy / "data/manifest.json").read_text())
        data["outputs"][f"examples/{results['headline_split']}.parquet"] += examples
        monkeypatch.setattr(tracking, "read_unchecked", partial(manifest_of, copy / "data", data))
        tracking.send(copy, tiny_params, profile="best")
        version = client.get_model_version_by_alias("bitdistill-best", "champion")
        champions.append((version.tags["bitdistill.run"], float(version.tags["bitdistill.score"])))
    assert champions == [("first", 0.7), ("first", 0.7), ("better", 0.8), ("equal", 0.8), ("equal", 0.8)]


def test_a_second_process_leaves_the_run_of_the_first_alone(
    client: MlflowClient, tiny_params: Params, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs/demo"
    with tracking.track_conversion(run_dir, tiny_params) as conversion:
        tracking.run_tracked("data", tiny_params, run_dir, conversion)
        with conversion.stage(find_node("base")) as report:
            report({"base/loss": 1.0}, 1)
            with (run_dir / ".work/base.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with (
                    pytest.raises(StageBusyError, match="another process is working on stage=base"),
                    tracking.track_conversion(run_dir, tiny_params) as second,
                ):
                    tracking.run_tracked("base", tiny_params, run_dir, second)
            states = {name: run.info.status for name, run in runs_of(client, tmp_path).items()}
            tracked = tracking.run_node(find_node("base"), tiny_params, run_dir, report=report)
    assert tracked.metrics["base/loss"] > 0
    assert second.is_shared
    assert states == {"demo": "RUNNING", "data": "FINISHED", "base": "RUNNING"}
    assert runs_of(client, tmp_path)["base"].info.status == "FINISHED"


def test_a_second_process_of_other_parameters_closes_its_own_run(
    client: MlflowClient, tiny_params: Params, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs/demo"
    (run_dir / ".work").mkdir(parents=True)
    with (run_dir / ".work/data.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StageBusyError), tracking.track_conversion(run_dir, tiny_params) as conversion:
            tracking.run_tracked("data", tiny_params, run_dir, conversion)
    assert {name: run.info.status for name, run in runs_of(client, tmp_path).items()} == {"demo": "KILLED"}


def test_sending_twice_adds_nothing(client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path) -> None:
    tracking.send(run_dir, tiny_params, profile="twice")
    before = runs_of(client, tmp_path)
    tracking.send(run_dir, tiny_params, profile="twice")
    after = runs_of(client, tmp_path)
    assert {name: run.info.end_time for name, run in after.items()} == {
        name: run.info.end_time for name, run in before.items()
    }
    for run in after.values():
        for key in run.data.metrics:
            steps = steps_of(client, run, key)
            assert len(set(steps)) == len(steps)
    assert len(client.search_model_versions("name = 'bitdistill-twice'")) == 1


def test_a_half_finished_run_is_sent_and_later_completed(
    client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path
) -> None:
    kept = run_dir.parent / "kept"
    shutil.copytree(run_dir, kept)
    for name in ("benchmark", "report"):
        shutil.rmtree(run_dir / name)
    tracking.send(run_dir, tiny_params)
    half = runs_of(client, tmp_path)
    assert half["demo"].info.status == "KILLED"
    assert set(half) == {"demo", *(node.name for node in NODES)} - {"benchmark", "report"}
    for name in ("benchmark", "report"):
        shutil.copytree(kept / name, run_dir / name)
    tracking.send(run_dir, tiny_params)
    whole = runs_of(client, tmp_path)
    assert whole["demo"].info.status == "FINISHED"
    assert whole["distill"].info.run_id == half["distill"].info.run_id
    assert "bitdistill/accuracy" in whole["demo"].data.metrics


def test_a_stage_made_with_other_parameters_is_left_out(
    client: MlflowClient, run_dir: Path, tiny_params: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_params.model_copy(update={"distill": tiny_params.distill.model_copy(update={"kd_temperature": 2.0})})
    with caplog.at_level(logging.WARNING):
        tracking.send(run_dir, other)
    runs = runs_of(client, tmp_path)
    assert {"teacher", "pretrain", "evaluate@bitnet_sft"} <= set(runs)
    assert not {"distill", "pack@bitdistill", "evaluate@bitdistill", "benchmark", "report"} & set(runs)
    assert "distill is not sent: it was made with other parameters or inputs" in caplog.text
    assert runs["demo"].info.status == "KILLED"


def test_an_empty_run_directory_cannot_be_sent(tiny_params: Params, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to send: no finished stage of these parameters in run_dir="):
        tracking.send(tmp_path / "runs/none", tiny_params)


def test_sending_to_a_dead_server_says_so(run_dir: Path, tiny_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD_SERVER)
    with pytest.raises(ValueError, match=r"cannot send run_dir=.* to MLflow"):
        tracking.send(run_dir, tiny_params)


def test_a_dead_server_costs_one_warning_and_no_metric(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD_SERVER)
    run_dir = tmp_path / "runs/demo"
    with caplog.at_level(logging.WARNING), tracking.track_conversion(run_dir, tiny_params) as conversion:
        for name in ("data", "base", "surgery"):
            tracking.run_tracked(name, tiny_params, run_dir, conversion)
    assert (run_dir / "base/metrics.jsonl").read_text().count("base/loss") == 5
    assert [record.name for record in caplog.records].count("tasks.tracking") == 1
    assert "MLflow tracking is off for the rest of this run" in caplog.text


def test_a_server_that_dies_midway_costs_one_warning_and_send_completes_the_run(
    client: MlflowClient, store: str, tiny_params: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "runs/demo"
    with caplog.at_level(logging.WARNING), tracking.track_conversion(run_dir, tiny_params) as conversion:
        tracking.run_tracked("data", tiny_params, run_dir, conversion)
        conversion._client = MlflowClient(DEAD_SERVER)
        tracking.run_tracked("base", tiny_params, run_dir, conversion)
    assert [record.name for record in caplog.records].count("tasks.tracking") == 1
    assert set(runs_of(client, tmp_path)) == {"demo", "data"}
    tracking.send(run_dir, tiny_params)
    assert set(runs_of(client, tmp_path)) == {"demo", "data", "base"}


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")])
def test_an_interrupted_stage_is_resumed_without_repeating_a_step(
    client: MlflowClient,
    tiny_params: Params,
    tmp_path: Path,
    finished_run: Path,
    error: type[BaseException],
    status: str,
) -> None:
    run_dir = tmp_path / "runs/demo"
    lines = [json.loads(line) for line in (finished_run / "base/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "base/loss" in line]

    def stop_midway() -> None:
        with tracking.track_conversion(run_dir, tiny_params) as conversion:
            tracking.run_tracked("data", tiny_params, run_dir, conversion)
            with conversion.stage(find_node("base")) as report:
                for line in lines[:2]:
                    report({"base/loss": line["base/loss"]}, line["step"])
                raise error("stop")

    with pytest.raises(error):
        stop_midway()
    stopped = runs_of(client, tmp_path)
    assert {name: run.info.status for name, run in stopped.items()} == {
        "demo": status,
        "data": "FINISHED",
        "base": status,
    }
    assert steps_of(client, stopped["base"], "base/loss") == [line["step"] for line in lines[:2]]
    with tracking.track_conversion(run_dir, tiny_params) as conversion:
        for name in ("data", "base"):
            tracking.run_tracked(name, tiny_params, run_dir, conversion)
    resumed = runs_of(client, tmp_path)
    assert resumed["base"].info.run_id == stopped["base"].info.run_id
    assert resumed["base"].info.status == "FINISHED"
    assert resumed["demo"].info.status == "RUNNING"  # the other stages are still to come
    assert steps_of(client, resumed["base"], "base/loss") == [line["step"] for line in lines if "base/loss" in line]


def test_tracking_switched_off_touches_nothing(tiny_params: Params, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/demo"
    result = tracking.run_stage("data", tiny_params, run_dir, profile="demo", track=False)
    assert not result.was_up_to_date
    assert not (tmp_path / "mlflow.db").exists()
