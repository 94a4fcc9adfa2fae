"""The paper's figures from a scale's results: 1 (model size), 2 (weights), 3a (SubLN), 3b (layer), 3c (teacher)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot

from bitdistill_core.report.curves import smoothed
from bitdistill_core.report.plots import BLUE, GREEN, INK, METHOD_COLOURS, ORANGE, STYLE
from bitdistill_core.report.weights import NUM_BINS, RANGE
from bitdistill_core.tables.plan import Plan
from bitdistill_core.tables.results import COLUMNS, Results, Row, write_rows

Tables = Mapping[str, Sequence[Row]]


def draw(plan: Plan, tables: Tables, results: Results, directory: Path) -> list[str]:
    """Writes NAME.csv and NAME.png of every figure that has data; returns their names."""
    figures: dict[str, Callable[[Plan, Tables, Results, Path], bool]] = {
        "figure1": _model_sizes,
        "figure2": _weights,
        "figure3a": _subln_curves,
        "figure3b": _methods("figure3b", "distilled layer"),
        "figure3c": _methods("figure3c", "teacher"),
    }
    return [name for name, figure in figures.items() if figure(plan, tables, results, directory)]


@contextmanager
def _panels(path: Path, number: int) -> Iterator[list[Axes]]:
    with matplotlib.rc_context(STYLE):
        plot = Plot(figsize=(4.6 * number, 3.2), layout="constrained")
        FigureCanvasAgg(plot)
        yield [plot.add_subplot(1, number, index + 1) for index in range(number)]
        plot.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def _model_sizes(plan: Plan, tables: Tables, results: Results, directory: Path) -> bool:
    """Accuracy by model size, one panel a task."""
    rows = [row for row in tables.get("table1", ()) if row.mean is not None]
    if not rows:
        return False
    write_rows(directory / "figure1.csv", COLUMNS, [row.values() for row in rows])
    tasks = list(dict.fromkeys(row.task for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 0.8 / len(methods)
    with _panels(directory / "figure1.png", len(tasks)) as panels:
        for task, axes in zip(tasks, panels, strict=True):
            for index, method in enumerate(methods):
                chosen = [row for row in rows if row.task == task and row.method == method]
                places = [models.index(row.model) + (index - (len(methods) - 1) / 2) * width for row in chosen]
                _points(axes, places, chosen, METHOD_COLOURS.get(method, GREEN), plan.methods[method].label)
            axes.set_xticks(range(len(models)), [plan.scale.models[model].label for model in models])
            axes.set_xlim(-0.5, len(models) - 0.4)
            axes.set_ylim(*_limits([row for row in rows if row.task == task]))
            axes.set_title(plan.scale.tasks[task].label, fontsize=10)
            axes.set_ylabel("accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        plot = panels[0].figure
        plot.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return True


def _methods(group: str, label: str) -> Callable[[Plan, Tables, Results, Path], bool]:
    def figure(plan: Plan, tables: Tables, results: Results, directory: Path) -> bool:
        rows = [row for row in tables.get(group, ()) if row.mean is not None]
        if not rows:
            return False
        tasks = list(dict.fromkeys(row.task for row in rows))
        with _panels(directory / f"{group}.png", len(tasks)) as panels:
            for task, axes in zip(tasks, panels, strict=True):
                chosen = headline(rows, task)
                _points(axes, list(range(len(chosen))), chosen, BLUE, None)
                axes.set_xlim(-0.5, len(chosen) - 0.4)
                names = [plan.methods[row.method].label for row in chosen]
                axes.set_xticks(range(len(chosen)), names, rotation=30, ha="right", fontsize=8)
                axes.set_ylim(*_limits(chosen))
                axes.set_xlabel(label)
                axes.set_ylabel(f"{chosen[0].metric}, %")
                axes.set_title(plan.scale.tasks[task].label, fontsize=10)
        return True

    return figure


def headline(rows: Sequence[Row], task: str) -> list[Row]:
    """The rows of a task by its first metric: bars of several metrics do not belong on one axis."""
    own = [row for row in rows if row.task == task]
    return [row for row in own if row.metric == own[0].metric]


def _weights(plan: Plan, tables: Tables, results: Results, directory: Path) -> bool:
    """Latent weights relative to their scale before and after continued pre-training."""
    chosen = next(
        (r for cell, r in results.items() if cell.method == "bitdistill" and "pretrain" in r["weights"]), None
    )
    if chosen is None:
        return False
    edges = np.linspace(-RANGE, RANGE, NUM_BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    stages = {"surgery": ("after surgery", INK), "pretrain": ("after continued pre-training", ORANGE),
              "distill": ("after distillation", BLUE)}  # fmt: skip
    series = {name: chosen["weights"][name]["density"] for name in stages if name in chosen["weights"]}
    values = [[f"{x:.4f}", *(density[i] for density in series.values())] for i, x in enumerate(centres)]
    write_rows(directory / "figure2.csv", ("weight_over_scale", *series), values)
    with _panels(directory / "figure2.png", 1) as (axes,):
        for name, density in series.items():
            axes.plot(centres, density, color=stages[name][1], label=stages[name][0], linewidth=1.2)
        for threshold in (-0.5, 0.5):
            axes.axvline(threshold, color=INK, linestyle=":", linewidth=0.8)
        axes.set_xlabel("latent weight / weight scale")
        axes.set_ylabel("density")
        axes.legend(fontsize=8)
    return True


def _subln_curves(plan: Plan, tables: Tables, results: Results, directory: Path) -> bool:
    """Loss of continued pre-training with and without SubLN."""
    compared = ("bitdistill", "subln_none", "subln_all", "subln_preserve")
    groups: dict[tuple[str, str, int], dict[str, list[tuple[int, float]]]] = {}
    for cell, result in results.items():
        if cell.method in compared and (curve := _pretrain_curve(result)):
            groups.setdefault((cell.model, cell.task, cell.seed), {})[cell.method] = curve
    found = next((group for group in groups.values() if len(group) > 1), None)
    if found is None:
        return False
    curves = {method: found[method] for method in compared if method in found}
    rows = [(method, step, value) for method, curve in curves.items() for step, value in curve]
    write_rows(directory / "figure3a.csv", ("method", "step", "loss"), rows)
    with _panels(directory / "figure3a.png", 1) as (axes,):
        for (method, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, INK), strict=False):
            steps, values = zip(*curve, strict=True)
            axes.plot(steps, smoothed(values, 0.6), color=colour, linewidth=1.2, label=plan.methods[method].label)
        axes.set_xlabel("step of continued pre-training")
        axes.set_ylabel("loss")
        axes.legend(fontsize=8)
    return True


def _pretrain_curve(result: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in result["curves"].get("pretrain/loss", [])]


def _points(axes: Axes, places: Sequence[float], rows: Sequence[Row], colour: str, label: str | None) -> None:
    """Means as points with their 95% intervals: the axis need not begin at 0, as that of bars."""
    for place, row in zip(places, rows, strict=True):
        if row.mean is None:
            continue
        if row.ci_low is not None and row.ci_high is not None:
            axes.vlines(place, row.ci_low, row.ci_high, color=colour, linewidth=1.4)
        axes.plot(place, row.mean, "o", color=colour, markersize=5, label=label)
        axes.annotate(f"{row.mean:.1f}", (place, row.mean), (5, 0), textcoords="offset points", va="center", fontsize=7)
        label = None


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    low = min(row.ci_low if row.ci_low is not None else row.mean or 0.0 for row in rows)
    high = max(row.ci_high if row.ci_high is not None else row.mean or 0.0 for row in rows)
    return max(0.0, low - 1), high + 1
