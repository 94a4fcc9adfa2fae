"""Runs the cells of a plan: what is finished is found, what fails is told at the end, and time is kept to."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdistill_core.tables.cell import chain, discard_checkpoints, read_result, run_cell
from bitdistill_core.tables.plan import Cell, Plan

Tell = Callable[[str], None]


class OutOfTime(Exception):
    """The budget is spent; training stays at its last checkpoint."""


@dataclass
class Outcome:
    """What became of the cells."""

    finished: list[Cell] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    left: list[Cell] = field(default_factory=list)


def run_plan(
    plan: Plan,
    *,
    store: Path,
    results: Path,
    data_root: str | None,
    groups: Sequence[str] | None = None,
    budget_minutes: float | None = None,
    keep_checkpoints: bool = False,
    tell: Tell = print,
    on_result: Callable[[Cell, dict[str, Any]], None] | None = None,
) -> Outcome:
    """Runs every cell of the groups (None: all), most valuable first, and writes each result when it is there.

    Args:
        store: stages and checkpoints; results: result files, below cells/.
        budget_minutes: stop after so long, at a training checkpoint; the same call goes on from there. None: no limit.
        keep_checkpoints: keep models that no further cell needs.
        on_result: called for every cell that was run.
    """
    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes

    def keep_time(metrics: dict[str, float], step: int) -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime

    cells = plan.cells(groups)
    outcome = Outcome()
    for number, cell in enumerate(cells, start=1):
        last = chain(plan, cell, data_root=data_root)
        if read_result(results, cell, last) is not None:
            outcome.finished.append(cell)
            continue
        tell(f"[{number}/{len(cells)}] {cell}")
        started = time.monotonic()
        try:
            keep_time({}, 0)
            result = run_cell(plan, cell, store=store, results=results, data_root=data_root, report=keep_time)
        except OutOfTime:
            outcome.left = [cell for cell in cells[number - 1 :] if cell not in outcome.finished]
            tell(f"the budget of {budget_minutes} minutes is spent; cells left: {len(outcome.left)}")
            break
        except ValueError as error:  # a cell that diverges must not cost the others
            outcome.failed[cell] = " ".join(str(error).split())
            tell(f"failed: {cell}: {outcome.failed[cell]}")
            continue
        outcome.finished.append(cell)
        headline = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
        tell(f"[{number}/{len(cells)}] {cell}: {headline} ({time.monotonic() - started:.0f} s)")
        if on_result is not None:
            on_result(cell, result)
        if not keep_checkpoints:
            discard_checkpoints(plan, store, [cell], cells[number:])
    return outcome
