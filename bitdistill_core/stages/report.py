"""Stage `report`: the numbers of a finished conversion as one HTML page, Markdown, JSON and plots.

Writes index.html, report.md, results.json, images/*.png and plots/losses.csv.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bitdistill_core.config import ReportConfig
from bitdistill_core.manifest import Metrics, Report


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    data: Path
    base: Path
    teacher: Path
    surgery: Path
    pretrain: Path
    distill: Path
    bitnet_sft: Path
    pack_bitnet_sft: Path
    pack_bitdistill: Path
    evaluate_fp16_sft: Path
    evaluate_bitnet_sft: Path
    evaluate_bitdistill: Path
    evaluate_bitnet_sft_packed: Path
    evaluate_bitdistill_packed: Path
    benchmark: Path


def run(
    config: ReportConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Reads, draws and writes; computes no model. The final metrics are the headline numbers.

    Raises:
        ValueError: an input directory lacks a file or contradicts another.
    """
    from bitdistill_core.report.write import write_report  # matplotlib: training must not need it

    metrics = write_report(asdict(inputs), out_dir, title=config.title, loss_smoothing=config.loss_smoothing)
    report(metrics, 0)
    return metrics
