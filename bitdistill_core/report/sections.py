"""What the report says, in order: the document built from the run's numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdistill_core.privacy import without_private
from bitdistill_core.report import plots, tables
from bitdistill_core.report.document import Document, Section
from bitdistill_core.report.formatting import duration
from bitdistill_core.report.gather import Run
from bitdistill_core.report.verdict import floors, verdict
from bitdistill_core.report.weights import WeightSummary

WHY_NO_LOSSES = {
    "base": "base was loaded from a checkpoint and not trained here.",
    "pretrain": "Continued pre-training was skipped: pretrain reported no steps.",
}


def build_document(
    run: Run,
    results: Mapping[str, Any],
    weights: Mapping[str, WeightSummary],
    *,
    title: str,
    loss_smoothing: float,
    images: Path,
) -> Document:
    """Draws the plots into `images` and arranges everything."""
    canvas = plots.Canvas(images)
    task = run.evaluations["fp16_sft"].task
    return Document(
        title=title,
        subtitle=f"Run {run.name}, task {task}, seed {run.seed}, {duration(60 * results['minutes'])} of computing.",
        verdict=verdict(results),
        sections=[
            _result(canvas, run, results),
            _splits(run, results),
            _losses(canvas, run, loss_smoothing),
            _balance(canvas, run),
            _weights(canvas, run, weights),
            _agreement(run, results),
            _time(canvas, run),
            Section("Model and data", tables=[tables.model_table(run)]),
            _environment(run),
            _configuration(run),
        ],
    )


def _result(canvas: plots.Canvas, run: Run, results: Mapping[str, Any]) -> Section:
    teacher = run.benchmark_row("fp16_sft")
    notes = [
        "FP16-SFT is the full-precision teacher, evaluated in float32; its file counts the weights at 16 bits.",
        "The accuracy of BitNet-SFT and BitDistill is the student's in PyTorch; packed: the packed file in the engine.",
        "Peak memory is that of the whole process, libraries included." if teacher else "",
        floors(results),
    ]
    if run.is_generation:
        notes[1] = notes[1].replace("accuracy", "score")
        figure = plots.generation_figure(canvas, run)
    else:
        figure = plots.accuracy_figure(canvas, run, results["floors"])
    shown = [note for note in notes if note]
    return Section("Result", paragraphs=shown, tables=[tables.headline_table(run, results)], figures=[figure])


def _splits(run: Run, results: Mapping[str, Any]) -> Section:
    paragraphs, shown = [], [tables.splits_table(run)]
    if results["paired"]:
        shown.append(tables.paired_table(results))
        paragraphs.append(
            f"Comparisons pair the predictions on {run.headline}: a bootstrap interval over examples and an exact "
            "McNemar test. They say nothing about other seeds."
        )
    else:
        paragraphs.append("Generated text has no interval and no paired comparison here.")
    return Section("All splits", paragraphs=paragraphs, tables=shown)


def _losses(canvas: plots.Canvas, run: Run, factor: float) -> Section:
    paragraphs, figures = [], []
    for stage, parts in run.losses.items():
        if stage in run.block_errors:
            figures.append(plots.block_error_figure(canvas, stage, run.block_errors[stage]))
        if parts.get("loss"):
            figures.append(plots.loss_figure(canvas, stage, parts, factor))
        elif stage not in run.block_errors:
            paragraphs.append(WHY_NO_LOSSES.get(stage, f"{stage} reported no losses."))
    return Section("Losses", paragraphs=paragraphs, figures=figures)


def _balance(canvas: plots.Canvas, run: Run) -> Section:
    if not run.grad_norms:
        text = (
            "Gradient norms of the loss parts were not measured: distill.grad_norm_every was 0, or there was one part."
        )
        return Section("Balance of the distillation loss", paragraphs=[text])
    text = "A part whose gradient is much smaller than the others' hardly steers the training."
    return Section(
        "Balance of the distillation loss",
        paragraphs=[text],
        figures=[plots.grad_norm_figure(canvas, run.grad_norms)],
    )


def _weights(canvas: plots.Canvas, run: Run, weights: Mapping[str, WeightSummary]) -> Section:
    paragraphs = [] if run.is_pretrained else [WHY_NO_LOSSES["pretrain"]]
    figures = [plots.weights_figure(canvas, weights)] if weights else []
    return Section("Weights and thresholds", paragraphs, [tables.weights_table(weights)] if weights else [], figures)


def _agreement(run: Run, results: Mapping[str, Any]) -> Section:
    text = "Share of examples on which the packed model repeats its student's prediction."
    return Section("Packed models", paragraphs=[text], tables=[tables.agreement_table(run, results)])


def _time(canvas: plots.Canvas, run: Run) -> Section:
    text = "This report is not counted."
    figure = plots.time_figure(canvas, run.seconds())
    return Section("Time", paragraphs=[text], tables=[tables.time_table(run)], figures=[figure])


def _environment(run: Run) -> Section:
    shown = [table for table in (tables.environment_table(run), tables.spread_table(run)) if table.rows]
    return Section("Environment", paragraphs=[] if shown else ["The benchmark recorded no environment."], tables=shown)


def _configuration(run: Run) -> Section:
    """Each stage's configuration, which evaluations share; of absolute paths only the last part."""
    listings: dict[str, str] = {}
    for name, manifest in run.manifests.items():
        title = name.partition("@")[0]
        listings.setdefault(title, json.dumps(_shown(manifest.get("config", {})), indent=1))
    return Section("Configuration", listings=list(listings.items()))


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _shown(one) for key, one in value.items()}
    return without_private(value) if isinstance(value, str) else value
