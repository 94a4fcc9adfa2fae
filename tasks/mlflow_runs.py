"""Runs in MLflow: connection, experiment, parameters, metrics in batches. What the runs are is others' business.

mlflow is imported where it is used: that takes seconds, and `--no-track` needs none of it.
"""

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill_core.privacy import without_private
from tasks.parameters import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

SYSTEM_METRICS_SECONDS = 5.0
MAX_BATCH_METRICS, MAX_BATCH_PARAMS = 1000, 100  # MLflow's limits


def connect(default_experiment: str) -> tuple["MlflowClient", "Experiment"]:
    """A client of the tracking server, ./mlflow.db unless MLFLOW_TRACKING_URI names one, and the experiment to use.

    The experiment is made on first use; a local store keeps its artifacts in ./mlartifacts.
    """
    import mlflow

    for name in ("alembic", "mlflow", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    return client, _experiment(client, default_experiment, is_local=uri.startswith("sqlite:"))


def find_runs(client: "MlflowClient", experiment: "Experiment", tags: Mapping[str, str]) -> "list[Run]":
    """The runs with all of these tags."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(client.search_runs([experiment.experiment_id], query))


def log_params(client: "MlflowClient", run_id: str, values: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    """Parameters as `section.key`, nothing private in the values, and tags."""
    from mlflow.entities import Param, RunTag

    texts = {key: without_private(str(value)) for key, value in flatten(values).items()}
    for batch in _chunks([Param(key, text) for key, text in texts.items()], MAX_BATCH_PARAMS):
        client.log_batch(run_id, params=batch)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


class BufferedRun:
    """A run in MLflow with a buffer of metrics. A step of a metric is sent once."""

    def __init__(self, client: "MlflowClient", run_id: str, fingerprint: str | None, keys: set[str]) -> None:
        self.client, self.run_id, self.fingerprint = client, run_id, fingerprint
        self.flushed = time.monotonic()
        self._buffer: list[Any] = []
        self._monitor: Any = None
        names = {key for key in keys if not key.startswith("system/")}
        self._sent = {(m.key, m.step) for key in names for m in client.get_metric_history(run_id, key)}

    @property
    def keys(self) -> set[str]:
        """Metrics that have a value."""
        return {key for key, _ in self._sent}

    def add(self, metrics: Mapping[str, float], step: int, timestamp: float) -> None:
        from mlflow.entities import Metric

        for name, value in metrics.items():
            key = re.sub(r"[^\w./ :-]", "_", name)
            if (key, step) not in self._sent:
                self._sent.add((key, step))
                self._buffer.append(Metric(key, float(value), int(timestamp * 1000), int(step)))

    def flush(self) -> None:
        for batch in _chunks(self._buffer, MAX_BATCH_METRICS):
            self.client.log_batch(self.run_id, metrics=batch)
        self._buffer.clear()
        self.flushed = time.monotonic()

    def start_system_metrics(self, uri: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(
            self.run_id, sampling_interval=SYSTEM_METRICS_SECONDS, resume_logging=True, tracking_uri=uri
        )
        self._monitor.start()

    def end(self, status: str, ended: float, *, fingerprint: str | None) -> None:
        self.flush()
        if self._monitor is not None:
            self._monitor.finish()
        if fingerprint is not None:
            self.client.set_tag(self.run_id, "bitdistill.fingerprint", fingerprint)
            self.fingerprint = fingerprint
        self.client.set_terminated(self.run_id, status, int(ended * 1000))


def _experiment(client: "MlflowClient", default_name: str, *, is_local: bool) -> "Experiment":
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", default_name)
    found = client.get_experiment_by_name(name)
    if found is None:
        location = (Path.cwd() / "mlartifacts").as_uri() if is_local else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on the runs, not on traces
        try:
            return client.get_experiment(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise  # not made by another process meanwhile
    return found


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
