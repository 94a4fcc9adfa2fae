"""The copy of a conversion in MLflow: a parent run a conversion, a nested run a stage.

The files of the run directory come first. A stage is sent from its metrics.jsonl whether it has just ended, was up to
date or is sent days later by `send`; while it trains, its reports go ahead of that in batches. What is already in
MLflow is never sent twice. A tracking server that is down costs one warning, never the conversion.

mlflow is imported where it is used: that takes seconds, and `--no-track` needs none of it.
"""

import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from bitdistill_core import __version__
from bitdistill_core.config import Params
from bitdistill_core.manifest import METRICS, METRICS_LOG, Report, Result, StageBusyError
from bitdistill_core.packing import PACKED_FILE
from bitdistill_core.pipeline import NODES, Node, find_node, run_node
from bitdistill_core.privacy import without_private
from tasks.mlflow_runs import BufferedRun, connect, find_runs, log_params
from tasks.packed_model import MAX_NEW_TOKENS
from tasks.results import headline_metrics, packed_score
from tasks.run_files import current_manifests, end_time, is_finished, is_whole, read_unchecked, section_of
from tasks.versioning import git_commit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

log = logging.getLogger(__name__)
FLUSH_SECONDS = 5.0
PACKED = "pack@bitdistill"
P = ParamSpec("P")


def run_tracked(name: str, params: Params, run_dir: Path, conversion: "Conversion") -> Result:
    """Runs one stage, or finds it up to date, and copies what it reports into the conversion."""
    node = find_node(name)
    with conversion.stage(node) as report:
        return run_node(node, params, run_dir, report=report)


def run_stage(name: str, params: Params, run_dir: Path, *, profile: str, track: bool) -> Result:
    """One stage on its own, for the command line and DVC."""
    with track_conversion(run_dir, params, profile=profile, enabled=track) as conversion:
        return run_tracked(name, params, run_dir, conversion)


@contextmanager
def track_conversion(
    run_dir: Path, params: Params, *, profile: str | None = None, flow_run_id: str | None = None, enabled: bool = True
) -> Iterator["Conversion"]:
    """The MLflow run of a conversion, new or resumed; it ends as FAILED or KILLED when the block raises.

    Args:
        profile: None takes it from the run's name, PROFILE or PROFILE-seedN.
        flow_run_id: Prefect's, as a tag.
        enabled: False keeps everything out of MLflow.
    """
    conversion = Conversion(run_dir, params, profile)
    if enabled:
        conversion.open(time.time(), flow_run_id)
    try:
        yield conversion
    except StageBusyError:
        if not conversion.is_shared:
            conversion.close("KILLED", time.time())
        raise
    except BaseException as error:
        conversion.close("FAILED" if isinstance(error, Exception) else "KILLED", time.time())
        raise
    conversion.close(None, time.time())


def send(run_dir: Path, params: Params, *, profile: str | None = None) -> dict[str, Any]:
    """Sends a finished or half-finished run to MLflow from its files, with their time stamps.

    Raises:
        ValueError: no finished stage in run_dir, or the tracking server does not take it.
    """
    found = current_manifests(run_dir, params)
    if not found:
        raise ValueError(
            f"nothing to send: no finished stage of these parameters in run_dir={run_dir}; give the name of a run, and "
            "the profile, overrides and seed that it was made with"
        )
    conversion = Conversion(run_dir, params, profile, must_arrive=True)
    conversion.open(min(manifest["started"] for manifest in found.values()), None)
    for node in NODES:
        if node.name in found:
            conversion.send_stage(node)
        elif is_finished(node, run_dir):
            log.warning("%s is not sent: it was made with other parameters or inputs", node.directory(run_dir))
    conversion.close(None if len(found) == len(NODES) else "KILLED", max(map(end_time, found.values())))
    return {"run": run_dir.name, "run_id": conversion._parent.info.run_id, "stages": len(found)}


def _guarded(
    method: Callable[Concatenate["Conversion", P], None],
) -> Callable[Concatenate["Conversion", P], None]:
    """Does nothing once tracking is off; any failure turns it off with one warning, or is an error in `send`."""

    @functools.wraps(method)
    def guarded(self: "Conversion", *args: P.args, **kwargs: P.kwargs) -> None:
        if self.is_off:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # whatever a tracking server does, the conversion goes on
            cause = without_private(f"{type(error).__name__}: {str(error)[:200]}")
            if self.must_arrive:
                raise ValueError(f"cannot send run_dir={self.run_dir} to MLflow: {cause}") from None
            if self.is_off:
                return  # a method that this one called has said so
            self.is_off = True
            log.warning(
                "MLflow tracking is off for the rest of this run (%s); nothing is lost: the metrics are in %s, and "
                "`bitdistill track` sends them later",
                cause,
                self.run_dir,
            )

    return guarded


class Conversion:
    """One conversion in MLflow. Every public method is safe to call with tracking off."""

    def __init__(self, run_dir: Path, params: Params, profile: str | None, *, must_arrive: bool = False) -> None:
        self.run_dir, self.params, self.must_arrive = run_dir, params, must_arrive
        self.profile = profile if profile is not None else re.sub(r"-seed\d+$", "", run_dir.name)
        self.is_off = True  # until `open`
        self.is_shared = False  # whether another process may be writing the same run
        self._is_changed = False
        self._stages: dict[str, BufferedRun] = {}
        self._done: set[str] = set()
        self._client: MlflowClient
        self._experiment: Experiment
        self._parent: Run

    def open(self, started: float, flow_run_id: str | None) -> None:
        """Finds or makes the parent run."""
        self.is_off = False
        self._open(started, flow_run_id)

    @contextmanager
    def stage(self, node: Node) -> Iterator[Report]:
        """The report function of a stage that is about to run; afterwards its files are in MLflow."""

        def report(metrics: dict[str, float], step: int) -> None:
            self._report(node, metrics, step)

        try:
            yield report
        except StageBusyError:
            raise
        except BaseException as error:
            self._abort_stage(node, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self.send_stage(node)

    @_guarded
    def send_stage(self, node: Node) -> None:
        """Sends what MLflow lacks of a finished stage."""
        directory = node.directory(self.run_dir)
        manifest = read_unchecked(directory)
        self._done.add(node.name)
        lines = [json.loads(line) for line in (directory / METRICS_LOG).read_text().splitlines()]
        run = self._stages.get(node.name) or self._find_stage(node, manifest["fingerprint"])
        if run is not None and run.fingerprint == manifest["fingerprint"]:
            return
        run = run or self._new_stage(node, min([manifest["started"], *(line["time"] for line in lines)]))
        for line in lines:
            run.add({key: v for key, v in line.items() if key not in ("step", "time")}, line["step"], line["time"])
        final: dict[str, float] = json.loads((directory / METRICS).read_text())
        ended = end_time(manifest)
        run.add({k: v for k, v in final.items() if k not in run.keys}, lines[-1]["step"] if lines else 0, ended)
        run.add({"seconds": manifest["seconds"]}, 0, ended)
        run.end("FINISHED", ended, fingerprint=manifest["fingerprint"])
        if node.name == "data":
            self._log_datasets(manifest, final)

    @_guarded
    def close(self, status: str | None, ended: float) -> None:
        """Ends the parent run. Status None: FINISHED when every stage is done, else it stays RUNNING."""
        if status is None and (len(self._done) == len(NODES) or is_whole(self.run_dir, self.params)):
            self._log_results()
            status = "FINISHED"
        if status is not None and (self._is_changed or self._parent.info.status != "FINISHED"):
            self._client.set_terminated(self._parent.info.run_id, status, int(ended * 1000))

    @_guarded
    def _open(self, started: float, flow_run_id: str | None) -> None:
        self._client, self._experiment = connect("bitdistill")
        values = self.params.model_dump(mode="json", exclude={"runtime"})
        commit = git_commit()
        key = hashlib.sha256(json.dumps([self.run_dir.name, values], sort_keys=True).encode()).hexdigest()
        tags = {
            "bitdistill.conversion": key,
            "bitdistill.run": self.run_dir.name,
            "bitdistill.profile": self.profile,
            "bitdistill.task": self.params.data.task,
            "bitdistill.version": __version__,
            **({"prefect.flow_run_id": flow_run_id} if flow_run_id else {}),
            **({"mlflow.source.git.commit": commit} if commit else {}),
        }
        found = find_runs(self._client, self._experiment, {"bitdistill.conversion": key})
        self.is_shared = bool(found) and found[0].info.status == "RUNNING"
        self._parent = found[0] if found else self._create_run(self.run_dir.name, started, tags)
        log_params(self._client, self._parent.info.run_id, values, tags)
        if found and self._parent.info.status != "FINISHED":
            self._client.update_run(self._parent.info.run_id, status="RUNNING")

    @_guarded
    def _start_stage(self, node: Node) -> None:
        run = self._find_stage(node, None) or self._new_stage(node, time.time())
        run.start_system_metrics(self._client.tracking_uri)
        self._stages[node.name] = run

    @_guarded
    def _report(self, node: Node, metrics: dict[str, float], step: int) -> None:
        if node.name not in self._stages:
            self._start_stage(node)
        run = self._stages[node.name]
        run.add(metrics, step, time.time())
        if time.monotonic() - run.flushed > FLUSH_SECONDS:
            run.flush()

    @_guarded
    def _abort_stage(self, node: Node, status: str) -> None:
        if node.name not in self._stages:
            self._start_stage(node)
        self._stages[node.name].end(status, time.time(), fingerprint=None)

    def _find_stage(self, node: Node, fingerprint: str | None) -> BufferedRun | None:
        """The nested run of this fingerprint, or else one that has not got as far as having a fingerprint."""
        found = find_runs(
            self._client,
            self._experiment,
            {"mlflow.parentRunId": self._parent.info.run_id, "bitdistill.stage": node.name},
        )
        for wanted in (fingerprint, None):
            for run in found:
                if run.data.tags.get("bitdistill.fingerprint") == wanted:
                    stage = BufferedRun(self._client, run.info.run_id, wanted, set(run.data.metrics))
                    if wanted is None:
                        self._client.update_run(run.info.run_id, status="RUNNING")
                        self._is_changed = True
                    return stage
        return None

    def _new_stage(self, node: Node, started: float) -> BufferedRun:
        tags = {"mlflow.parentRunId": self._parent.info.run_id, "bitdistill.stage": node.name}
        run = self._create_run(node.name, started, {**tags, "bitdistill.run": self.run_dir.name})
        log_params(self._client, run.info.run_id, {node.section: section_of(node, self.params)}, {})
        if not self._is_changed and self._parent.info.status == "FINISHED":
            self._client.update_run(self._parent.info.run_id, status="RUNNING")
        self._is_changed = True
        return BufferedRun(self._client, run.info.run_id, None, set())

    def _create_run(self, name: str, started: float, tags: dict[str, str]) -> "Run":
        return self._client.create_run(
            self._experiment.experiment_id, start_time=int(started * 1000), tags=tags, run_name=name
        )

    def _log_datasets(self, manifest: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = self.params.data
        splits = {data.train_split: "training", **dict.fromkeys(data.eval_splits, "evaluation")}
        rows = {
            f"{data.task} {split}": (f"examples/{'train' if context == 'training' else split}.parquet", context, split)
            for split, context in splits.items()
        }
        inputs = []
        for name, (file, context, split) in rows.items():
            profile = json.dumps({"num_rows": int(metrics[f"data/num_examples_{split}"])})
            source = json.dumps({"uri": without_private(data.examples)})
            dataset = Dataset(name, manifest["outputs"][file][:32], "local", source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self._client.log_inputs(self._parent.info.run_id, inputs)

    def _log_results(self) -> None:
        """The report, its headline numbers and the packed model, once for each report."""
        directory = self.run_dir / "report"
        manifest = read_unchecked(directory)
        run_id = self._parent.info.run_id
        if self._parent.data.tags.get("bitdistill.report") == manifest["fingerprint"]:
            return
        metrics = BufferedRun(self._client, run_id, None, set())
        results = json.loads((directory / "results.json").read_text())
        metrics.add(headline_metrics(results), 0, end_time(manifest))
        metrics.flush()
        self._client.log_artifacts(run_id, str(directory), "report")
        split = results["headline_split"]
        examples = read_unchecked(self.run_dir / "data")["outputs"][f"examples/{split}.parquet"]
        self._register_packed(packed_score(results), examples)
        self._client.set_tag(run_id, "bitdistill.report", manifest["fingerprint"])

    def _register_packed(self, score: float, examples: str) -> None:
        """The packed student as a registered pyfunc, unless this very file is.

        Alias champion, unless another version scored higher, or was evaluated on other examples.
        """
        import mlflow
        from mlflow.models import ModelSignature
        from mlflow.types import ParamSchema, ParamSpec

        directory = find_node(PACKED).directory(self.run_dir)
        manifest, run_id = read_unchecked(directory), self._parent.info.run_id
        if self._parent.data.tags.get("bitdistill.packed") == manifest["fingerprint"]:
            return
        signature = None
        if self.params.data.resolved_template.kind == "generation":  # MLflow passes no parameter that is not declared
            signature = ModelSignature(params=ParamSchema([ParamSpec("max_new_tokens", "long", MAX_NEW_TOKENS)]))
        with mlflow.start_run(run_id=run_id, nested=True):  # pyfunc.log_model knows only the active run
            info = mlflow.pyfunc.log_model(
                name="packed_model",
                loader_module="tasks.packed_model",
                data_path=str(directory / PACKED_FILE),
                pip_requirements=[f"bitdistill=={__version__}"],
                signature=signature,
            )
        name = f"bitdistill-{self.profile}"
        tags = {"bitdistill.score": repr(score), "bitdistill.examples": examples}
        tags["bitdistill.run"] = self.run_dir.name
        version = mlflow.register_model(info.model_uri, name, tags=tags)
        champion = self._client.get_registered_model(name).aliases.get("champion")
        best = self._client.get_model_version(name, champion).tags if champion is not None else tags
        if best.get("bitdistill.examples") != examples:
            log.warning(
                "version %s of model %s was evaluated on other examples than version %s, which stays its champion",
                version.version,
                name,
                champion,
            )
        elif score >= float(best["bitdistill.score"]):
            self._client.set_registered_model_alias(name, "champion", version.version)
        self._client.set_tag(run_id, "bitdistill.packed", manifest["fingerprint"])
        self._is_changed = True  # start_run ended the run with the time of now
