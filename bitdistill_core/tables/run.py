"""Runs the cells of a plan: what is finished is found, what fails is told at the end, and time is kept to.

Several processes may run one plan in the same folders: each takes the next cell that no other one works on. On a GPU
that a small model does not fill this is the way to fill it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdistill_core.errors import one_line
from bitdistill_core.manifest import StageBusyError
from bitdistill_core.tables.cell import discard_checkpoints, read_result, release_memory, run_cell
from bitdistill_core.tables.plan import Cell, Plan

POLL_SECONDS = 5.0  # between two looks at cells that other processes work on

Tell = Callable[[str], None]
RunCell = Callable[..., dict[str, Any]]  # takes what `run_cell` takes, and does it


class OutOfTime(Exception):
    """The budget is spent; training stays at its last checkpoint."""


@dataclass
class Outcome:
    """What became of the cells."""

    finished: list[Cell] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    left: list[Cell] = field(default_factory=list)


def survey(plan: Plan, cells: Sequence[Cell], results: Path, *, data_root: str | None = None) -> Outcome:
    """Which cells have a finished result of the plan's parameters and data, and which are left."""
    outcome = Outcome()
    for cell in cells:
        has_result = read_result(plan, cell, results, data_root=data_root) is not None
        (outcome.finished if has_result else outcome.left).append(cell)
    return outcome


def run_plan(
    plan: Plan,
    *,
    store: Path,
    results: Path,
    data_root: str | None,
    groups: Sequence[str] | None = None,
    cells: Sequence[Cell] | None = None,
    budget_minutes: float | None = None,
    keep_checkpoints: bool = False,
    tell: Tell = print,
    run: RunCell = run_cell,
    on_result: Callable[[Cell, dict[str, Any]], None] | None = None,
) -> Outcome:
    """Runs every cell of the groups (None: all), most valuable first, and writes each result when it is there.

    Args:
        store: stages and checkpoints; results: result files, below cells/.
        cells: run only these. A cell that no group names keeps its checkpoints, for the next one.
        budget_minutes: stop after so long, at a training checkpoint; the same call goes on from there. None: no limit.
        keep_checkpoints: keep models that no cell of the plan needs any more.
        run: what runs a cell; a flow gives each to a task of its own.
        on_result: called for every cell that this process, or another one meanwhile, has run.
    Raises:
        ValueError: an unknown group, or an unreadable result.
    """
    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes

    def keep_time(metrics: dict[str, float], step: int) -> None:
        # a stage without steps reports once, at its end: stopped there it would never get further
        if deadline is not None and step > 0 and time.monotonic() > deadline:
            raise OutOfTime

    planned = plan.cells()
    cells = plan.cells(groups) if cells is None else cells
    found = survey(plan, cells, results, data_root=data_root)
    pending, outcome = found.left, Outcome(found.finished)
    others = [cell for cell in planned if cell not in cells]
    needing = found.left + survey(plan, others, results, data_root=data_root).left
    queue, told = list(pending), set[Any]()

    def tell_once(key: Any, text: str) -> None:
        if key not in told:
            tell(text)
        told.add(key)

    def attempt(cell: Cell) -> bool:
        """Whether the cell has ended, well or not; False: another process works on it, or on what it needs."""
        place = f"[{len(cells) - len(queue) + 1}/{len(cells)}] {cell}"
        started = time.monotonic()
        try:
            keep_time({}, 1)
            tell_once(cell, place)
            result = run(plan, cell, store=store, results=results, data_root=data_root, report=keep_time)
        except StageBusyError:
            return False
        except (ValueError, RuntimeError) as error:
            # one that diverges, or is too large for the GPU, costs no other
            outcome.failed[cell] = one_line(error, None)
            tell(f"failed: {cell}: {outcome.failed[cell]}")
            return True
        outcome.finished.append(cell)
        headline = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
        tell(f"{place}: {headline} ({time.monotonic() - started:.0f} s)")
        if on_result is not None:
            on_result(cell, result)
        if cell in planned and not keep_checkpoints:
            # a cell that failed needs its checkpoints again, when its cause is mended
            unfinished = [other for other in needing if other not in outcome.finished]
            discard_checkpoints(plan, store, [cell], unfinished)
        return True

    try:
        while queue:
            # from the first again after each: what it waited for may be there now
            ended = next((cell for cell in queue if attempt(cell)), None)
            release_memory()
            if ended is None:
                tell_once(
                    len(queue),
                    f"other processes work on what is left, or on what it needs: {len(queue)} cells; waiting",
                )
                time.sleep(POLL_SECONDS)
            else:
                queue.remove(ended)
    except OutOfTime:
        outcome.left = queue
        tell(f"the budget of {budget_minutes} minutes is spent; cells left: {len(queue)}")
    return outcome
