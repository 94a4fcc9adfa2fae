"""The cells of the paper's tables, each a run of experiment bitdistill-tables in MLflow.

Result files come first; MLflow is their copy, sent when a cell ends or, for one that was there already, afterwards. A
run is known by its cell and recipe and is never made twice. A server that is down costs one warning, never a cell.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill_core import __version__
from bitdistill_core.privacy import without_private
from bitdistill_core.tables.cell import chain, read_result, result_path, run_cell
from bitdistill_core.tables.plan import Cell, Plan
from bitdistill_core.tables.run import Outcome, RunCell, Tell, run_plan, survey
from tasks.mlflow_runs import BufferedRun, connect, find_runs, log_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

log = logging.getLogger(__name__)
EXPERIMENT = "bitdistill-tables"


def run_tables(
    plan: Plan,
    *,
    store: Path,
    results: Path,
    data_root: str | None = None,
    groups: Sequence[str] | None = None,
    cells: Sequence[Cell] | None = None,
    budget_minutes: float | None = None,
    keep_checkpoints: bool = False,
    is_survey: bool = False,
    track: bool = True,
    tell: Tell = print,
    run: RunCell = run_cell,
) -> Outcome:
    """What `run_plan` does; every finished cell of these, old or new, is then in MLflow.

    Args:
        is_survey: run nothing, find what is there.
        track: False keeps everything out of MLflow.
    """
    copy = TablesCopy(plan, results, enabled=track)
    if is_survey:
        outcome = survey(plan, plan.cells(groups) if cells is None else cells, results)
    else:
        outcome = run_plan(
            plan,
            store=store,
            results=results,
            data_root=data_root,
            groups=groups,
            cells=cells,
            budget_minutes=budget_minutes,
            keep_checkpoints=keep_checkpoints,
            tell=tell,
            run=run,
            on_result=copy.send,
        )
    copy.send_missing(outcome.finished)
    return outcome


class TablesCopy:
    """The cells of a plan in MLflow. Every method is safe to call with tracking off."""

    def __init__(self, plan: Plan, results: Path, *, enabled: bool = True) -> None:
        self.plan, self.results, self.is_off = plan, results, not enabled
        self._known: set[Cell] = set()
        self._connection: tuple[MlflowClient, Experiment] | None = None  # until it is needed

    def send_missing(self, cells: Sequence[Cell]) -> None:
        """Sends the results of finished cells that MLflow lacks."""
        for cell in cells:
            if cell not in self._known and not self.is_off:
                result = read_result(self.plan, cell, self.results)
                if result is not None:
                    self.send(cell, result)

    def send(self, cell: Cell, result: dict[str, Any]) -> None:
        """Sends a result, unless MLflow has it; a failure turns tracking off with one warning."""
        if self.is_off:
            return
        try:
            self._send(cell, result)
        except Exception as error:  # whatever a tracking server does, the cells go on
            self.is_off = True
            log.warning(
                "MLflow tracking is off for the rest of these tables (%s); nothing is lost: the results are in %s, and "
                "`bitdistill tables --render-only` sends them later",
                without_private(f"{type(error).__name__}: {str(error)[:200]}"),
                self.results,
            )

    def _send(self, cell: Cell, result: dict[str, Any]) -> None:
        if self._connection is None:
            self._connection = connect(EXPERIMENT)
        client, experiment = self._connection
        identity = {
            "bitdistill.scale": self.plan.name,
            "bitdistill.cell": str(cell),
            "bitdistill.recipe": result["recipe"],
        }
        found = find_runs(client, experiment, identity)
        self._known.add(cell)
        if found and found[0].info.status == "FINISHED":
            return
        ended = result_path(self.results, cell).stat().st_mtime
        started = ended - sum(result["seconds"].values())
        if found:  # sending it was interrupted
            entry = found[0]
        else:
            entry = client.create_run(
                experiment.experiment_id, start_time=int(1000 * started), tags=identity, run_name=str(cell)
            )
        log_params(client, entry.info.run_id, self._params(cell), self._tags(cell, result))
        run = BufferedRun(client, entry.info.run_id, None, set(entry.data.metrics))
        for name, points in result["curves"].items():
            for step, value in points:
                run.add({name: value}, step, ended)
        run.add(_metrics(result), 0, ended)
        run.end("FINISHED", ended, fingerprint=None)

    def _params(self, cell: Cell) -> dict[str, Any]:
        """The cell's names, and the parameters of the stages that made it; of its own base where there are two."""
        params = self.plan.params(cell)
        sections = {step.name: step.config for step in reversed(chain(self.plan, cell).before())}
        sections |= {"data": params.data, "evaluate": params.evaluate}
        return {**vars(cell), **{name: config.model_dump(mode="json") for name, config in sections.items()}}

    def _tags(self, cell: Cell, result: dict[str, Any]) -> dict[str, str]:
        groups = [group for group in self.plan.scale.groups if cell in self.plan.cells([group])]
        return {
            "bitdistill.groups": " ".join(groups),
            "bitdistill.method": self.plan.methods[cell.method].label,
            "bitdistill.split": result["split"],
            "bitdistill.device": result["device"],
            "bitdistill.version": __version__,
        }


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    names = ("num_examples", "ci_low", "ci_high")
    seconds = {f"seconds/{stage}": value for stage, value in result["seconds"].items()}
    return {**result["metrics"], **{name: result[name] for name in names if name in result}, **seconds}
