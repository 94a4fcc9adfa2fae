"""The conversion as a Prefect flow: every node of the core's graph, in its order, through one task each.

Runs with a temporary server (`python -m flows.convert`, `bitdistill convert`) and under a worker (prefect.yaml).
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from prefect import flow
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run
from pydantic import Field

from bitdistill_core.config import Params
from bitdistill_core.params import load_params, run_name
from bitdistill_core.pipeline import NODES, find_node
from flows.server import start_temporary_server
from tasks import stages, tracking, versioning
from tasks.parameters import flatten
from tasks.results import headline_metrics, results_table
from tasks.tracking import Conversion


def _flow_run_name() -> str:
    given = flow_run.parameters
    return given["name"] or (given["profile"] if given["seed"] is None else f"{given['profile']}-seed{given['seed']}")


@flow(name="convert", flow_run_name=_flow_run_name, validate_parameters=True)
def convert(
    profile: str = "demo",
    overrides: list[str] | dict[str, Any] | None = None,
    seed: Annotated[int, Field(ge=0)] | None = None,
    name: str | None = None,
    data_root: str | None = None,
    params_file: Path = Path("params.yaml"),
    runs_dir: Path = Path("runs"),
    track: bool = True,
) -> dict[str, Any]:
    """Converts a model: every stage, from data to report. Finished stages are found up to date.

    Args:
        profile: demo, or a file name in profiles/.
        overrides: `section.key=value` strings, or a mapping of section.key to value.
        seed: replaces every seed.
        name: of the run, runs/NAME; else PROFILE or PROFILE-seedN.
        data_root: read parquet below this directory instead of the hub.
        params_file: the parameter file, with profiles/ beside it.
        runs_dir: where runs are kept.
        track: record the run in MLflow.
    Raises:
        ValueError: a wrong parameter, before any stage starts, or what the failing stage says.
    """
    changes = override_strings(overrides)
    params = load_params(params_file, profile=profile, overrides=changes, seed=seed, data_root=data_root)
    run_dir = runs_dir / run_name(profile, seed=seed, name=name)
    recording = tracking.track_conversion(run_dir, params, profile=profile, flow_run_id=flow_run.id, enabled=track)
    with recording as conversion:
        _run_stages(params, run_dir, conversion)
    versioning.commit(run_dir, params, params_file=params_file)
    return _publish(run_dir)


def run_locally(**parameters: Any) -> dict[str, Any]:
    """`convert` from a terminal."""
    start_temporary_server()
    result: dict[str, Any] = convert(**parameters)
    return result


def override_strings(overrides: list[str] | Mapping[str, Any] | None) -> list[str]:
    """Overrides as `section.key=value`; a mapping may be nested."""
    if isinstance(overrides, Mapping):
        return [
            f"{key}={json.dumps(value, ensure_ascii=False)}"
            for key, value in flatten(overrides, whole=["data.template"]).items()
        ]
    return list(overrides or [])


def _run_stages(params: Params, run_dir: Path, conversion: Conversion) -> None:
    progress = create_progress_artifact(0.0, key="stages", description=f"Stages of {run_dir.name}")
    assert isinstance(progress, UUID)  # a coroutine only inside async code
    outcomes: dict[str, stages.Outcome] = {}
    for number, node in enumerate(NODES, start=1):
        feeding = [outcomes[source] for source in node.inputs.values()]
        outcomes[node.name] = stages.STAGES[node.section](node.name, params, run_dir, conversion, wait_for=feeding)
        update_progress_artifact(progress, round(100 * number / len(NODES), 1), description=f"{node.name} is done")


def _publish(run_dir: Path) -> dict[str, Any]:
    """Artifacts on the flow run's page, and the flow's result."""
    directory = find_node("report").directory(run_dir)
    results = json.loads((directory / "results.json").read_text())
    page = directory / "index.html"
    create_markdown_artifact(results_table(results), key="results", description=f"Results of {run_dir.name}")
    create_link_artifact(page.resolve().as_uri(), link_text=str(page), key="report", description="The report")
    return {"run_dir": str(run_dir), "report": str(page), **headline_metrics(results)}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(run_locally()))
