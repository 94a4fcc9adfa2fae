"""Stage `teacher`: full-precision fine-tuning of the base model on the task (the paper's FP16-SFT)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitdistill_core import checkpoint
from bitdistill_core.config import TeacherConfig
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.stages import training
from bitdistill_core.stages.training import Context


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    model: Path
    data: Path = field(metadata={"reads": ("examples/train.parquet", "task.json")})


def run(
    config: TeacherConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes the fine-tuned model."""
    model, tokenizer = checkpoint.load_model(inputs.model)
    metrics = training.train_on_task(
        model, tokenizer, config, inputs.data, Context("teacher", work_dir, report, device)
    )
    checkpoint.save_model(model, tokenizer, out_dir)
    return metrics
