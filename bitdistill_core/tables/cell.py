"""One cell of the tables: its chain of stages, its result file, and what becomes of the checkpoints.

Stages lie in a store, STORE/STAGE/RECIPE, where cells find each other's work: the recipe is a digest of the stage's
parameters and of everything before it, without what is only the machine's (device, threads, where data lie). A result
is finished when its file names the recipe that the plan asks for, and the local files that it was made from, where they
are found, have not changed; checkpoints may be gone by then.
"""

import fcntl
import gc
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel

from bitdistill_core import __version__, checkpoint
from bitdistill_core.config import EvaluateConfig
from bitdistill_core.disk import write_text
from bitdistill_core.evaluate import score_examples, wilson_interval
from bitdistill_core.manifest import (
    METRICS_LOG,
    Report,
    code_commit,
    decisive,
    digest_file,
    discard,
    execute,
    locked,
    read_manifest,
)
from bitdistill_core.report.weights import summarize
from bitdistill_core.runtime import prepare_runtime
from bitdistill_core.scorers import TorchScorer
from bitdistill_core.stages import base, data, distill, pretrain, stage_sources, surgery, teacher
from bitdistill_core.stages.data import examples_path, read_eval_splits, read_task
from bitdistill_core.stages.fit import require_fit
from bitdistill_core.tables.plan import Cell, Plan

CURVES = ("pretrain/loss", "distill/loss", "distill/task_loss", "teacher/loss")
CURVE_POINTS = 100
OFF: tuple[Any, ...] = (0, None, "none", "absmean", [])


@dataclass(frozen=True)
class Step:
    """One stage of a chain."""

    name: str
    stage: ModuleType
    config: BaseModel
    inputs: Mapping[str, "Step"] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """Digest of what the stage does, 16 hexadecimal digits."""
        config = decisive(self.config.model_dump(mode="json"))
        identity = [
            self.name,
            _switched_on(config),
            {key: step.recipe for key, step in self.inputs.items()},
            __version__,
        ]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def directory(self, store: Path) -> Path:
        """Where its result lies."""
        return store / self.name / self.recipe

    def work_root(self, store: Path) -> Path:
        """Where it is made."""
        return store / ".work" / f"{self.name}-{self.recipe}"

    def before(self) -> list["Step"]:
        """Every step it needs, in the order to run them, each once, itself last."""
        steps = [step for source in self.inputs.values() for step in source.before()]
        return list({step.recipe: step for step in [*steps, self]}.values())


def _switched_on(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without those that are off, so that a new option, off, does not make old results stale.

    A section whose num_epochs is 0 is off.
    """
    return {
        key: _switched_on(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value not in OFF and not (isinstance(value, dict) and value.get("num_epochs") == 0)
    }


def chain(plan: Plan, cell: Cell, *, data_root: str | None = None) -> Step:
    """The last step of a cell: the one whose model is evaluated."""
    params = plan.params(cell, data_root=data_root)
    method = plan.methods[cell.method]
    examples = Step("data", data, params.data)
    # bases and continued pre-training know the corpus only, so every task shares them
    general = Step("data", data, plan.params(_on_first_task(plan, cell), data_root=data_root).data)
    dense = Step("base", base, params.base, {"data": general})
    large, large_params = dense, params
    if method.teacher_model is not None:
        other = Cell(method.teacher_model, cell.task, cell.method, cell.seed)
        large_params = plan.params(other, data_root=data_root)
        large = Step("base", base, large_params.base, {"data": general})
    tuned = Step("teacher", teacher, large_params.teacher, {"model": large, "data": examples})
    if method.result == "teacher":
        return tuned
    calibrated_on = examples if params.surgery.calibration == "examples" else general
    if method.result == "ptq":
        return Step("surgery", surgery, params.surgery, {"model": tuned, "data": calibrated_on})
    operated = Step("surgery", surgery, params.surgery, {"model": dense, "data": calibrated_on})
    trained = Step("pretrain", pretrain, params.pretrain, {"student": operated, "base": dense, "data": general})
    # fine-tuning without distillation needs no teacher: its recipe must not depend on one
    guide = tuned if params.distill.is_taught else dense
    return Step("distill", distill, params.distill, {"student": trained, "teacher": guide, "data": examples})


def _on_first_task(plan: Plan, cell: Cell) -> Cell:
    return Cell(cell.model, next(iter(plan.scale.tasks)), cell.method, cell.seed)


def result_path(results: Path, cell: Cell) -> Path:
    """The result file of a cell."""
    return results / "cells" / cell.path


def read_result(plan: Plan, cell: Cell, results: Path, *, data_root: str | None = None) -> dict[str, Any] | None:
    """The finished result of a cell; None where there is none, or one of other parameters or data."""
    path = result_path(results, cell)
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        recipe = result.get("recipe")
    except (ValueError, AttributeError):
        raise ValueError(f"unreadable result path={path}; delete it and run the cell again") from None
    last, length = chain(plan, cell, data_root=data_root), plan.params(cell).evaluate.max_new_tokens
    if recipe != last.recipe or result.get("max_new_tokens", length) != length:
        return None
    made_from = result.get("sources", {})
    here = _sources(last) if made_from else {}
    return result if all(here.get(name, digest) == digest for name, digest in made_from.items()) else None


def _sources(last: Step) -> dict[str, str]:
    """Digest of every local file that the steps of a chain read, by folder and name; none of data that are not here."""
    paths: set[Path] = set()
    for step in last.before():
        with suppress(ValueError):
            paths |= set(stage_sources(step.stage, step.config))
    return {f"{path.parent.name}/{path.name}": _known_digest(path, path.stat().st_mtime_ns) for path in sorted(paths)}


@lru_cache(maxsize=256)
def _known_digest(path: Path, modified: int) -> str:
    return digest_file(path)


def run_cell(
    plan: Plan, cell: Cell, *, store: Path, results: Path, data_root: str | None, report: Report = discard
) -> dict[str, Any]:
    """Runs what is missing of a cell's stages, evaluates its model and writes its result.

    Raises:
        StageBusyError: another process runs the cell, or a stage that it needs.
    """
    with locked(_cell_root(store, cell), fcntl.LOCK_EX):
        done = read_result(plan, cell, results, data_root=data_root)
        return _run_cell(plan, cell, store, results, data_root, report) if done is None else done


def require_free(plan: Plan, cell: Cell, *, store: Path, data_root: str | None) -> None:
    """Raises StageBusyError where another process runs the cell, or a stage that it needs."""
    with locked(_cell_root(store, cell), fcntl.LOCK_SH):
        _require_free(chain(plan, cell, data_root=data_root).before(), store)


def _require_free(steps: Iterable[Step], store: Path) -> None:
    for step in steps:
        with locked(step.work_root(store), fcntl.LOCK_SH):
            pass


def _cell_root(store: Path, cell: Cell) -> Path:
    return store / ".work" / "-".join(("cell", *cell.path.with_suffix("").parts))


def _run_cell(
    plan: Plan, cell: Cell, store: Path, results: Path, data_root: str | None, report: Report
) -> dict[str, Any]:
    last = chain(plan, cell, data_root=data_root)
    params = plan.params(cell, data_root=data_root)
    device = prepare_runtime(params.runtime)
    seconds: dict[str, float] = {}
    examples = Step("data", data, params.data)  # what it is evaluated on
    floors: dict[str, float] = {}  # what needs no language model, in a classification task
    steps = {step.recipe: step for step in [examples, *last.before()]}.values()
    bases = [step for step in steps if step.stage is base]  # the student's, and the teacher's where it is another
    _require_free(steps, store)  # before anything is read: what another process makes is waited for
    for step in sorted(steps, key=lambda step: step.stage not in (data, base)):
        directory = step.directory(store)
        finished = execute(
            step.name,
            step.stage.run,
            step.config,
            step.stage.Inputs(**{name: source.directory(store) for name, source in step.inputs.items()}),
            directory=directory,
            work_root=step.work_root(store),
            input_roots=[source.work_root(store) for source in step.inputs.values()],
            sources=stage_sources(step.stage, step.config),
            report=report,
            device=device,
        )
        seconds[step.name] = seconds.get(step.name, 0.0) + finished.seconds
        if step is bases[-1]:
            corpus = bases[0].inputs["data"].directory(store)
            require_fit(
                params,
                bases[0].directory(store),
                data_dir=corpus,
                examples_dir=examples.directory(store),
                teacher_dir=step.directory(store),
            )
        if step.recipe == examples.recipe:
            floors = {name: value for name, value in finished.metrics.items() if name.endswith("_accuracy")}
    made = read_manifest(last.directory(store))["fingerprint"][:16]
    data_dir = examples.directory(store)
    asked = digest_file(examples_path(data_dir, read_eval_splits(data_dir)[0]))[:16]
    kept = store / ".work" / f"generated-{made}-{asked}-{params.evaluate.max_new_tokens}.jsonl"
    result = {
        "cell": vars(cell),
        "recipe": last.recipe,
        "sources": _sources(last),
        "seconds": seconds,
        "device": str(device),
        "commit": code_commit(),
        "floors": floors,
        **_evaluate(last.directory(store), data_dir, params.evaluate, device, kept),
        "curves": _curves(last, store),
        "weights": _weights(last, store),
    }
    path = result_path(results, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result) + "\n")
    kept.unlink(missing_ok=True)
    return result


def release_memory() -> None:
    """Gives the memory of a GPU that this process keeps for itself to others; behind the handling of an error."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def discard_checkpoints(plan: Plan, store: Path, finished: list[Cell], pending: list[Cell]) -> None:
    """Deletes the models in the store that finished cells made and no pending cell needs. Data and bases stay."""
    needed = {step.recipe for cell in pending for step in chain(plan, cell).before()}
    for cell in finished:
        for step in chain(plan, cell).before():
            if step.name not in ("data", "base") and step.recipe not in needed:
                shutil.rmtree(step.directory(store), ignore_errors=True)


def _evaluate(
    model_dir: Path, data_dir: Path, config: EvaluateConfig, device: torch.device, kept: Path
) -> dict[str, Any]:
    task = read_task(data_dir)
    split = read_eval_splits(data_dir)[0]
    model, tokenizer = checkpoint.load_model(model_dir)
    scorer = TorchScorer(model, tokenizer, batch_size=config.batch_size, device=device)
    found = score_examples(
        scorer,
        is_generation=task.kind == "generation",
        examples=examples_path(data_dir, split),
        max_new_tokens=config.max_new_tokens,
        name=f"{task.name} {split}",
        kept=kept,
    )
    out: dict[str, Any] = {"split": split, "num_examples": found.num_examples, "metrics": found.metrics}
    if task.kind == "classification":
        out["ci_low"], out["ci_high"] = wilson_interval(found.metrics["accuracy"], found.num_examples)
        out["labels"] = [line["label"] for line in found.predictions]
        out["predictions"] = [line["prediction"] for line in found.predictions]
    else:
        out["max_new_tokens"] = config.max_new_tokens
        out["scores"] = [line["scores"] for line in found.predictions]
    return out


def _curves(last: Step, store: Path) -> dict[str, list[tuple[int, float]]]:
    """The loss curves of every training stage of the chain, thinned to CURVE_POINTS averages."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step in last.before():
        path = step.directory(store) / METRICS_LOG
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for name in CURVES:
            points = [(int(line["step"]), float(line[name])) for line in lines if name in line]
            size = max(1, -(-len(points) // CURVE_POINTS))
            groups = [points[i : i + size] for i in range(0, len(points), size)]
            if groups:
                curves[name] = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return curves


def _weights(last: Step, store: Path) -> dict[str, Any]:
    """Where the latent weights lie after surgery, continued pre-training and distillation (BitDistill figure 2)."""
    out: dict[str, Any] = {}
    directories = {step.name: step.directory(store) for step in last.before()}
    if "surgery" not in directories:
        return out
    modules = [change["module"] for change in json.loads((directories["surgery"] / "surgery.json").read_text())]
    for name in ("surgery", "pretrain", "distill"):
        if name not in directories:
            continue
        quantizer = checkpoint.saved_quantizer(directories[name])
        summary = summarize(directories[name] / checkpoint.WEIGHTS, modules, quantizer)
        out[name] = {
            "density": [round(value, 5) for value in summary.density],
            "code_shares": summary.code_shares,
            "near_share": summary.near_share,
        }
    return out
