"""Rows of the tables from result files: means over seeds, 95% intervals, paired comparisons. Missing cells show.

Intervals are percentile bootstraps over examples and seeds; for the accuracy of one seed, Wilson's.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.evaluate import wilson_interval
from bitdistill_core.report.paired import mcnemar_p
from bitdistill_core.tables.cell import read_result
from bitdistill_core.tables.plan import Cell, Plan

NUM_RESAMPLES = 4000
COLUMNS = ("method", "model", "task", "metric", "seeds", "mean", "spread", "ci_low", "ci_high", "paper")
PAIRED_COLUMNS = (
    "first", "second", "model", "task", "seeds", "num_examples", "difference", "ci_low", "ci_high", "mcnemar_p",
)  # fmt: skip
METRICS = {"classification": ["accuracy"], "generation": ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"]}

Results = Mapping[Cell, dict[str, Any]]
Scores = NDArray[np.float64]  # (seeds, examples)


@dataclass(frozen=True)
class Row:
    """One method on one model and task: a metric in percent. Without seeds nothing was run yet."""

    method: str
    model: str
    task: str
    metric: str
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    mean: float | None
    spread: float | None  # standard deviation over seeds; None for one seed
    ci_low: float | None
    ci_high: float | None
    paper: float | None

    def values(self) -> list[Any]:
        """As in COLUMNS; figures with two digits, what is not there empty."""
        figures = [self.mean, self.spread, self.ci_low, self.ci_high]
        return [
            self.method,
            self.model,
            self.task,
            self.metric,
            " ".join(map(str, self.seeds)),
            *("" if value is None else f"{value:.2f}" for value in figures),
            "" if self.paper is None else f"{self.paper:.2f}",
        ]


def collect(plan: Plan, results: Path) -> Results:
    """The finished results of a plan."""
    found = {cell: read_result(plan, cell, results) for cell in plan.cells()}
    return {cell: result for cell, result in found.items() if result is not None}


def read_paper(path: Path) -> dict[tuple[str, ...], float]:
    """The paper's numbers by (table, method, model, task, metric)."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return {
            (row["table"], row["method"], row["model"], row["task"], row["metric"]): float(row["value"]) for row in rows
        }


def table_rows(plan: Plan, group: str, results: Results, paper: Mapping[tuple[str, ...], float]) -> list[Row]:
    """The rows of a group: tasks, then models, then methods, in the plan's order."""
    spec = plan.scale.groups[group]
    seeds = spec.seeds or plan.scale.seeds
    rows = []
    for task in spec.tasks:
        for model in spec.models:
            for method in spec.methods:
                cells = [Cell(model, task, method, seed) for seed in seeds]
                done = {cell.seed: results[cell] for cell in cells if cell in results}
                kind = plan.params(cells[0]).data.resolved_template.kind
                for metric in next(iter(done.values()))["metrics"] if done else METRICS[kind]:
                    known = paper.get((group, method, plan.scale.models[model].stands_for or "", task, metric))
                    rows.append(_row(cells[0], metric, done, seeds, known))
    return rows


def compare(results: Results, first: Cell, second: Cell, seeds: Sequence[int]) -> dict[str, Any] | None:
    """`first` minus `second` on the same examples, in points, over the seeds that both have; None without any.

    McNemar's p is of the first seed: its test is for one pair of models.
    """
    both = [(results.get(replace(first, seed=seed)), results.get(replace(second, seed=seed))) for seed in seeds]
    pairs = [(x, y) for x, y in both if x is not None and y is not None]
    if not pairs:
        return None
    a, b = _scores([x for x, _ in pairs], None), _scores([y for _, y in pairs], None)
    if a is None or b is None or a.shape != b.shape or any(x.get("labels") != y.get("labels") for x, y in pairs):
        return None
    low, high = _bootstrap(a - b) if (a != b).any() else (None, None)  # no interval where no example differs
    p = None
    if "labels" in pairs[0][0]:
        p = mcnemar_p(int(((a[0] > 0) & (b[0] == 0)).sum()), int(((a[0] == 0) & (b[0] > 0)).sum()))
    return {
        "first": first.method,
        "second": second.method,
        "model": first.model,
        "task": first.task,
        "seeds": len(pairs),
        "num_examples": a.shape[1],
        "difference": float((a - b).mean()),
        "ci_low": low,
        "ci_high": high,
        "mcnemar_p": p,
    }


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _row(cell: Cell, metric: str, done: Mapping[int, dict[str, Any]], seeds: Sequence[int], paper: float | None) -> Row:
    missing = tuple(seed for seed in seeds if seed not in done)
    if not done:
        return Row(cell.method, cell.model, cell.task, metric, (), missing, None, None, None, None, paper)
    factor = 100.0 if metric == "accuracy" else 1.0
    values = [factor * result["metrics"][metric] for result in done.values()]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    scores = _scores(list(done.values()), metric)
    low, high = _bootstrap(scores) if scores is not None else (None, None)
    if metric == "accuracy" and len(done) == 1 and scores is not None:  # the bootstrap's is a point where all are right
        low, high = (factor * bound for bound in wilson_interval(values[0] / factor, scores.size))
    return Row(
        cell.method,
        cell.model,
        cell.task,
        metric,
        tuple(done),
        missing,
        float(np.mean(values)),
        spread,
        low,
        high,
        paper,
    )


def _scores(results: Sequence[dict[str, Any]], metric: str | None) -> Scores | None:
    """Per-example scores in percent; of generation the metric's, or ROUGE-L. None for a metric of the whole corpus."""
    if "labels" in results[0]:
        return 100.0 * np.array([np.equal(r["predictions"], r["labels"]) for r in results], dtype=np.float64)
    name = metric or "rougeL"
    if name not in results[0]["scores"][0]:
        return None
    return np.array([[line[name] for line in r["scores"]] for r in results])


def _bootstrap(scores: Scores) -> tuple[float, float]:
    """95% percentile interval of the mean of (S, E) scores, examples and seeds resampled.

    Resampled seeds deviate less from their mean than seeds do, by (S - 1) / S in the variance, so their deviation is
    scaled. Of one seed the interval is of the examples only.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_examples = scores.shape
    widening = math.sqrt(num_seeds / (num_seeds - 1)) if num_seeds > 1 else 0.0
    over_seeds = scores.mean(axis=0)
    means = np.empty(NUM_RESAMPLES)
    for index in range(NUM_RESAMPLES):
        seeds = rng.integers(num_seeds, size=num_seeds) if num_seeds > 1 else np.zeros(1, np.int64)
        examples = rng.integers(num_examples, size=num_examples)
        mean = over_seeds[examples].mean()
        means[index] = mean + widening * (scores[seeds].mean(axis=0)[examples].mean() - mean)
    low, high = np.quantile(means, [0.025, 0.975]).clip(scores.min(), scores.max())
    return float(low), float(high)
