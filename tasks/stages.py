"""The core's stages as Prefect tasks, one each, and a cell of the tables. They take paths and parameters.

Prefect's cache is off: the core's manifest decides what is up to date. No retries: training that fails must fail.
"""

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Cancelled, State

from bitdistill_core.config import Params
from bitdistill_core.manifest import StageBusyError
from bitdistill_core.pipeline import NODES
from bitdistill_core.tables.cell import run_cell
from bitdistill_core.tables.plan import Cell, Plan
from bitdistill_core.tables.run import OutOfTime
from tasks.tracking import Conversion, run_tracked

Outcome = dict[str, Any]
BUSY = "Busy"  # the state of a cell that another process works on


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drops the traceback of a ValueError, which is a user's error and says what to change."""
    if record.exc_info and isinstance(record.exc_info[1], ValueError):
        record.exc_info = None
    return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_without_traceback)


def _run(node: str, params: Params, run_dir: Path, conversion: Conversion) -> Outcome:
    result = run_tracked(node, params, run_dir, conversion)
    state = "up to date" if result.was_up_to_date else "done"
    get_run_logger().info("%s: %s (%.1f s) in %s", node, state, result.seconds, result.directory)
    return {
        "stage": node,
        "directory": str(result.directory),
        "was_up_to_date": result.was_up_to_date,
        "seconds": result.seconds,
        "metrics": result.metrics,
    }


def _stage_task(stage: ModuleType) -> Task[[str, Params, Path, Conversion], Outcome]:
    name = stage.__name__.rpartition(".")[2]
    return task(name=name, description=stage.__doc__, task_run_name="{node}", cache_policy=NO_CACHE)(_run)


STAGES = {node.section: _stage_task(node.stage) for node in NODES}  # a stage's section and task share its name


@task(task_run_name="{cell}", cache_policy=NO_CACHE)
def cell(cell: Cell, plan: Plan, options: dict[str, Any]) -> dict[str, Any] | State[Any]:
    """One cell of the tables: its result, or a cancelled state when the time is up or another process works on it."""
    try:
        return run_cell(plan, cell, **options)
    except StageBusyError:
        return Cancelled(name=BUSY, message="another process works on it, or on what it needs")
    except OutOfTime:
        return Cancelled(message="the budget is spent; the cell goes on from its last checkpoint in the next run")
