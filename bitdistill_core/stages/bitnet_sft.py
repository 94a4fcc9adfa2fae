"""Stage `bitnet_sft`, the paper's baseline: BitLinear without SubLN, then fine-tuning with cross-entropy alone.

No continued pre-training, no distillation. The student's embeddings end on the INT8 grid, as BitDistill's do.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitdistill_core import checkpoint
from bitdistill_core.config import BitnetSftConfig
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.stages import training
from bitdistill_core.stages.training import Context
from bitdistill_core.surgery import operate


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    model: Path
    data: Path = field(metadata={"reads": ("examples/train.parquet", "task.json")})


def run(
    config: BitnetSftConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes the baseline student."""
    student, tokenizer = checkpoint.load_model(inputs.model)
    operate(student, subln="none", sub_norm_eps=1e-6)
    metrics = training.train_on_task(
        student, tokenizer, config, inputs.data, Context("bitnet_sft", work_dir, report, device)
    )
    training.round_embeddings(student)
    checkpoint.save_model(student, tokenizer, out_dir)
    return metrics
