"""Stage 2 of BitDistill, `pretrain`: continued pre-training of the student through its quantised forward pass."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bitdistill_core import checkpoint
from bitdistill_core.config import PretrainConfig
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.stages import training


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    student: Path
    data: Path


def run(
    config: PretrainConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes the student after `num_tokens` of the corpus; with num_tokens 0 the student as it came."""
    student, tokenizer = checkpoint.load_model(inputs.student)
    metrics = training.train_on_corpus(
        student, tokenizer, config, inputs.data, name="pretrain", work_dir=work_dir, report=report, device=device
    )
    checkpoint.save_model(student, tokenizer, out_dir)
    return metrics
