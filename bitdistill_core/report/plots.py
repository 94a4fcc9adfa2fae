"""The report's plots. Each is a small panel, so that a page can set them side by side or below each other.

Colours are Okabe-Ito's; inside the page INK becomes the colour of the text and BLUE that of marks.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bitdistill_core.report.curves import smoothed
from bitdistill_core.report.document import Figure
from bitdistill_core.report.formatting import METHOD_LABELS, PART_LABELS
from bitdistill_core.report.gather import METHODS, PACKED, Curve, Run
from bitdistill_core.report.weights import NUM_BINS, RANGE, WeightSummary

INK = "#30363d"
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
METHOD_COLOURS = {"fp16_sft": INK, "bitnet_sft": ORANGE, "bitdistill": BLUE}
PART_COLOURS = {"loss": INK, "task_loss": BLUE, "logits_kd": ORANGE, "attention_kd": GREEN, "hidden_kd": VERMILION}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


class Canvas:
    """Draws one panel twice: a PNG file on white, and SVG text for the page.

    No SVG file: `dvc plots show` puts every image of the directory on its page, and would show each plot twice.
    """

    def __init__(self, images: Path) -> None:
        self.images = images
        images.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def panel(self, name: str, *, height: float = 2.9) -> Iterator[tuple[Axes, dict[str, str]]]:
        """Yields the axes and a dict that holds the page's SVG under `svg` afterwards."""
        out: dict[str, str] = {}
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            plot = Plot(figsize=(4.4, height), layout="constrained")
            FigureCanvasAgg(plot)
            axes = plot.add_subplot()
            yield axes, out
            plot.savefig(self.images / f"{name}.png", dpi=160, facecolor="white", metadata={"Software": None})
            text = io.StringIO()
            plot.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        out["svg"] = _inline(text.getvalue(), name)


def accuracy_figure(canvas: Canvas, run: Run, floors: Mapping[str, float]) -> Figure:
    """Headline accuracy with 95% intervals, packed models as crosses, floors as dotted lines."""
    with canvas.panel("accuracy") as (axes, out):
        for row, method in enumerate(METHODS):
            _interval(axes, row, run.evaluations[method].splits[run.headline], METHOD_COLOURS[method], packed=False)
            if method in PACKED:
                packed = run.evaluations[PACKED[method]].splits[run.headline]
                _interval(axes, row + 0.28, packed, METHOD_COLOURS[method], packed=True)
        styles = {"majority_accuracy": ("commonest label", ":"), "naive_bayes_accuracy": ("naive Bayes", "--")}
        for name, value in floors.items():
            label, style = styles[name]
            axes.axvline(100 * value, color=INK, linestyle=style, linewidth=1, label=label)
        axes.plot([], [], "o", color=INK, label="model")
        axes.plot([], [], "x", color=INK, markeredgewidth=1.8, label="packed")
        _method_axis(axes, run.headline, "accuracy, %")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    return Figure(
        "accuracy",
        out["svg"],
        "Accuracy of FP16-SFT, BitNet-SFT and BitDistill with 95% intervals and the floors.",
        f"Accuracy on {run.headline} with 95% Wilson intervals. The axis does not start at zero.",
    )


def generation_figure(canvas: Canvas, run: Run) -> Figure:
    """Every metric of a generation task, one mark a method."""
    with canvas.panel("metrics") as (axes, out):
        for method in METHODS:
            values = run.evaluations[method].splits[run.headline]["metrics"]
            marks = [values[name] for name in run.metric_names]
            axes.plot(marks, range(len(marks)), "o", color=METHOD_COLOURS[method], label=METHOD_LABELS[method])
        axes.set_yticks(range(len(run.metric_names)), run.metric_names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(f"score on {run.headline}, of 100")
        _grid(axes, "x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1, handletextpad=0.2)
    return Figure("metrics", out["svg"], "ROUGE and BLEU of the three methods.", f"Scores on {run.headline}.")


def loss_figure(canvas: Canvas, stage: str, parts: Mapping[str, Curve], factor: float) -> Figure:
    """Loss by part: smoothed, with the reported values faint behind. A single part is drawn once, as the total."""
    shown = {part: parts[part] for part in (parts if len(parts) > 2 else ("loss",))}
    name = f"loss-{stage.replace('_', '-')}"
    with canvas.panel(name) as (axes, out):
        for part, curve in shown.items():
            width = 3.5 if part == "loss" and len(shown) > 1 else 1.8  # one part may make up nearly all of the total
            _curve(axes, curve, PART_COLOURS[part], PART_LABELS[part], factor, width)
        _step_axes(axes, shown, f"{stage} loss")
        if len(shown) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    text = f"Loss of {stage} over optimiser steps."
    by_part = " by weighted part" if len(shown) > 1 else ""
    return Figure(name, out["svg"], text, f"{stage}: loss{by_part}. Bold: moving average, factor {factor:g}.")


def block_error_figure(canvas: Canvas, stage: str, errors: Curve) -> Figure:
    """The error that block-wise distillation left behind each block."""
    name = f"block-errors-{stage}"
    with canvas.panel(name) as (axes, out):
        blocks, values = zip(*errors, strict=True)
        axes.bar(blocks, values, color=BLUE, width=0.7)
        axes.set_xlabel("decoder block")
        axes.set_ylabel("relative error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _grid(axes, "y")
    text = f"Relative error behind each decoder block after block-wise distillation in {stage}."
    caption = f"{stage}, block-wise: squared distance to the teacher's hidden state, relative to its square."
    return Figure(name, out["svg"], text, caption)


def grad_norm_figure(canvas: Canvas, norms: Mapping[str, Curve]) -> Figure:
    """Gradient norm of each weighted part of the distillation loss."""
    with canvas.panel("gradient-norms") as (axes, out):
        for part, curve in norms.items():
            steps, values = zip(*curve, strict=True)
            axes.plot(steps, values, marker=".", color=PART_COLOURS[part], linewidth=1.4, label=PART_LABELS[part])
        _step_axes(axes, norms, "gradient norm")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3)
    return Figure(
        "gradient-norms",
        out["svg"],
        "Gradient norms of the parts of the distillation loss over steps.",
        "distill: L2 norm of each weighted part's gradient, before clipping.",
    )


def weights_figure(canvas: Canvas, summaries: Mapping[str, WeightSummary]) -> Figure:
    """Histogram of weight / absmean with the thresholds of the codes (BitDistill figure 2)."""
    edges = [-RANGE + 2 * RANGE * index / NUM_BINS for index in range(NUM_BINS + 1)]
    with canvas.panel("weights", height=3.1) as (axes, out):
        for (label, summary), colour in zip(summaries.items(), (ORANGE, BLUE, GREEN), strict=False):
            axes.stairs(summary.density, edges, color=colour, linewidth=1.5, label=label)
        threshold = next(iter(summaries.values())).threshold
        for place in {-threshold, threshold}:
            axes.axvline(place, color=INK, linestyle="--", linewidth=1)
        axes.set_xlim(-RANGE, RANGE)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("weight / absmean")
        axes.set_ylabel("density")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=1 if len(summaries) > 2 else 2)
    return Figure(
        "weights",
        out["svg"],
        "Histogram of latent weights relative to their scale, before and after training, with the thresholds.",
        "Latent weights of every BitLinear over the absmean of those that share a scale. Dashed: where a code changes.",
    )


def time_figure(canvas: Canvas, seconds: Mapping[str, float]) -> Figure:
    """Bars of each stage's minutes."""
    with canvas.panel("time", height=0.9 + 0.2 * len(seconds)) as (axes, out):
        axes.barh(list(seconds), [value / 60 for value in seconds.values()], color=BLUE, height=0.7)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.set_xlabel("minutes")
        _grid(axes, "x")
    return Figure("time", out["svg"], "Minutes by stage.", "Time by stage.")


def _interval(axes: Axes, row: float, numbers: Mapping[str, Any], colour: str, *, packed: bool) -> None:
    accuracy = 100 * numbers["metrics"]["accuracy"]
    if numbers.get("ci_low") is not None:
        axes.plot([100 * numbers["ci_low"], 100 * numbers["ci_high"]], [row, row], color=colour, linewidth=1.6)
    axes.plot(accuracy, row, "x" if packed else "o", color=colour, markersize=7, markeredgewidth=1.8)


def _method_axis(axes: Axes, split: str, label: str) -> None:
    axes.set_yticks(range(len(METHODS)), [METHOD_LABELS[method] for method in METHODS])
    axes.set_ylim(len(METHODS) - 0.4, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.set_xlabel(f"{label} on {split}")
    _grid(axes, "x")


def _curve(axes: Axes, curve: Curve, colour: str, label: str, factor: float, width: float) -> None:
    steps, values = zip(*curve, strict=True)
    if len(steps) == 1:
        axes.plot(steps, values, "o", color=colour, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=1, alpha=0.3)
    axes.plot(steps, smoothed(values, factor), color=colour, linewidth=width, label=label)


def _step_axes(axes: Axes, curves: Mapping[str, Curve], label: str) -> None:
    """Steps below; a log scale where the values span more than a factor of 20."""
    values = [value for curve in curves.values() for _, value in curve]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=_log_ticks(values), numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    _grid(axes, "y")


def _log_ticks(values: Sequence[float]) -> tuple[float, ...]:
    return (1, 2, 5) if max(values) < 1000 * min(values) else (1,)


def _grid(axes: Axes, axis: Any) -> None:
    axes.grid(axis=axis, color=INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)


def _inline(svg: str, name: str) -> str:
    """SVG for an HTML page: no prologue, metadata or name spaces, unique ids, ink in the text's colour."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None
    body = body.replace("xlink:href", "href").replace(INK, "currentColor").replace(BLUE, "var(--mark)")
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    return f'<svg viewBox="{box[1]}" role="img">{body.strip()}'
