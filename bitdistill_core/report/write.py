"""The whole report of a run, from stage directories to files."""

import json
from collections.abc import Mapping
from pathlib import Path

from bitdistill_core.checkpoint import WEIGHTS, saved_quantizer
from bitdistill_core.report.curves import write_losses
from bitdistill_core.report.gather import Run, read_run
from bitdistill_core.report.markdown import render_markdown
from bitdistill_core.report.page import render_page
from bitdistill_core.report.results import build_results, flat_metrics
from bitdistill_core.report.sections import build_document
from bitdistill_core.report.weights import WeightSummary, summarize


def write_report(
    directories: Mapping[str, Path], out_dir: Path, *, title: str, loss_smoothing: float
) -> dict[str, float]:
    """Writes index.html, report.md, results.json, images/ and plots/losses.csv; returns the headline numbers.

    Args:
        directories: stage directories by the names that gather.py reads.
        loss_smoothing: factor of the moving average in the loss plots; losses.csv is not smoothed.
    Raises:
        ValueError: a stage directory lacks a file, or its files contradict each other.
    """
    run = read_run(directories)
    results = build_results(run)
    (out_dir / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_losses(run.losses, out_dir / "plots" / "losses.csv")
    document = build_document(
        run,
        results,
        _summaries(run, directories),
        title=title,
        loss_smoothing=loss_smoothing,
        images=out_dir / "images",
    )
    (out_dir / "index.html").write_text(render_page(document), encoding="utf-8")
    (out_dir / "report.md").write_text(render_markdown(document), encoding="utf-8")
    return flat_metrics(results)


def _summaries(run: Run, directories: Mapping[str, Path]) -> dict[str, WeightSummary]:
    """By label. Without continued pre-training its checkpoint equals the one before, and is left out."""
    labels = {"surgery": "before pre-training", "pretrain": "after pre-training", "distill": "after distillation"}
    if not run.is_pretrained:
        labels = {"surgery": "before distillation", "distill": "after distillation"}
    modules = [change["module"] for change in run.surgery]
    paths = {label: directories[stage] for stage, label in labels.items()}
    return {label: summarize(path / WEIGHTS, modules, saved_quantizer(path)) for label, path in paths.items()}
