"""The paper's tables as a Prefect flow: one task run a cell, most valuable first.

The same cells, results and MLflow runs as `bitdistill tables`, which needs no server. Runs with a temporary server
(`python -m flows.tables`) and under a worker (prefect.yaml).
"""

import json
import logging
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from pydantic import Field

from bitdistill_core.manifest import StageBusyError
from bitdistill_core.tables.cell import require_free
from bitdistill_core.tables.plan import Cell, Plan, read_plan
from bitdistill_core.tables.render import render
from bitdistill_core.tables.run import OutOfTime, survey
from bitdistill_core.tables.speed import measure_speed
from flows.server import start_temporary_server
from tasks import stages
from tasks.tables import run_tables


@flow(name="tables", flow_run_name="tables-{profile}", validate_parameters=True)
def tables(
    profile: str = "cpu",
    groups: list[str] | None = None,
    budget_minutes: Annotated[float, Field(ge=0)] | None = None,
    data_root: str | None = None,
    out: Path | None = None,
    store: Path | None = None,
    keep_checkpoints: bool = False,
    track: bool = True,
    plans: Path = Path("tables"),
    params_file: Path = Path("params.yaml"),
) -> dict[str, Any]:
    """Runs the cells of a scale that are missing and writes its tables and figures.

    Args:
        profile: the scale, a file name in `plans`.
        groups: like table5; None: all.
        budget_minutes: stop after so long, at a training checkpoint; the next run goes on from there. None: no limit.
        data_root: read parquet below this directory instead of the hub.
        out: where results are written; None: results/PROFILE.
        store: where checkpoints are kept; None: runs/tables/PROFILE.
        keep_checkpoints: keep models that no further cell needs.
        track: record finished cells in MLflow.
        plans: the folder of scales; params_file: the parameter file.
    Raises:
        ValueError: a wrong parameter, before any cell starts, or cells that failed, when all others are done.
    """
    plan = read_plan(plans, profile, params_file)
    results = out or plan.default_results
    outcome = run_tables(
        plan,
        store=store or plan.default_store,
        results=results,
        data_root=data_root,
        groups=groups,
        budget_minutes=budget_minutes,
        keep_checkpoints=keep_checkpoints,
        track=track,
        tell=get_run_logger().info,
        run=_CellTasks(plan, plan.cells(groups), results),
    )
    if not outcome.left:
        measure_speed(plan, store=store or plan.default_store, results=results)
    render(plan, results, plans / "paper.csv")
    readme = results / "README.md"
    create_markdown_artifact(readme.read_text(), key="tables", description=plan.scale.description)
    if outcome.failed:
        reasons = "; ".join(f"{cell}: {reason}" for cell, reason in outcome.failed.items())
        raise ValueError(f"{len(outcome.failed)} cells failed, the others are in {readme}: {reasons}")
    return {"finished": len(outcome.finished), "left": len(outcome.left), "directory": str(results)}


def run_locally(**parameters: Any) -> dict[str, Any]:
    """`tables` from a terminal."""
    start_temporary_server()
    result: dict[str, Any] = tables(**parameters)
    return result


class _CellTasks:
    """Runs a cell in a task run of its own, and shows on the flow run's page how far the cells are."""

    def __init__(self, plan: Plan, cells: list[Cell], results: Path) -> None:
        self.num_cells, self.num_done = len(cells), len(survey(plan, cells, results).finished)
        artifact = create_progress_artifact(self._percent(), key="cells", description=f"Cells of {plan.name}")
        assert isinstance(artifact, UUID)  # a coroutine only inside async code
        self._artifact = artifact

    def __call__(self, plan: Plan, cell: Cell, **options: Any) -> Any:
        require_free(plan, cell, store=options["store"], data_root=options["data_root"])  # no task run just to wait
        state = stages.cell(cell, plan, options, return_state=True)
        if state.is_cancelled():
            raise StageBusyError(str(state.message)) if state.name == stages.BUSY else OutOfTime
        self.num_done += 1
        update_progress_artifact(self._artifact, self._percent(), description=f"{cell} has ended")
        return state.result()  # raises what the cell raised

    def _percent(self) -> float:
        return round(100 * self.num_done / self.num_cells, 1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(run_locally()))
