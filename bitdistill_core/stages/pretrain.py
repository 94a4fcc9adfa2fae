"""Stage 2 of BitDistill, `pretrain`: continued pre-training of the student through its quantised forward pass.

The paper's loss is cross-entropy (Eq. 7). The base model, which the student was made of, can teach in addition or
instead: its distribution of the next token, and the outputs of its blocks.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
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
    base: Path
    data: Path = field(metadata={"reads": ("corpus/",)})


def run(
    config: PretrainConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes the student after block-wise training and `num_tokens` of the corpus; without either as it came."""
    student, tokenizer = checkpoint.load_model(inputs.student)
    metrics: Metrics = {}
    blockwise, blockwise_steps = config.blockwise, 0
    if blockwise.num_epochs:
        blockwise_steps = training.corpus_steps(config, blockwise.num_tokens, blockwise.batch_size)
    if config.num_tokens or blockwise_steps:
        with ExitStack() as stack:
            loss_fn = None
            if config.is_taught:
                teacher, _ = training.load_teacher(
                    inputs.base, student, config, name="pretrain", device=device, stack=stack
                )
            if blockwise_steps:
                training.require_window(student.config, config.block_size, "pretrain.block_size")
                metrics = training.train_blockwise(
                    student,
                    teacher,
                    config,
                    training.corpus_batches(
                        tokenizer,
                        config,
                        inputs.data,
                        num_tokens=blockwise.num_tokens,
                        out=work_dir / "blockwise-tokens.bin",
                        batch_size=blockwise.batch_size,
                    ),
                    num_steps=blockwise_steps,
                    name="pretrain",
                    work_dir=work_dir,
                    report=report,
                    device=device,
                )
            if config.has_taught_loss:
                loss_fn = training.taught_loss_fn(
                    student,
                    teacher,
                    config,
                    stack,
                    task_loss_weight=config.task_loss_weight,
                    variant="authors",  # every position; tau squared keeps the gradient's size
                )
            if config.threshold_margin:
                training.clear_thresholds(student, config.threshold_margin)
            on_step = stack.enter_context(training.quantization_warmup(student, config.quantization_warmup))
            metrics = metrics | training.train_on_corpus(
                student,
                tokenizer,
                config,
                inputs.data,
                name="pretrain",
                work_dir=work_dir,
                report=report,
                device=device,
                loss_fn=loss_fn,
                on_step=on_step,
            )
    checkpoint.save_model(student, tokenizer, out_dir)
    return metrics
