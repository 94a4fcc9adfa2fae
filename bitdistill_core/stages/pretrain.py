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
from bitdistill_core.stages import student, training
from bitdistill_core.stages.training import Context


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
    model, tokenizer = checkpoint.load_model(inputs.student)
    context = Context("pretrain", work_dir, report, device)
    metrics: Metrics = {}
    blockwise, blockwise_steps = config.blockwise, 0
    if blockwise.num_epochs:
        blockwise_steps = training.corpus_steps(config, blockwise.num_tokens, blockwise.batch_size)
    if config.num_tokens or blockwise_steps:
        with ExitStack() as stack:
            loss_fn = None
            if config.is_taught:
                teacher, _ = student.load_teacher(inputs.base, model, config, context, stack)
            if blockwise_steps:
                training.require_window(model.config, config.block_size, "pretrain.block_size")
                batches = training.corpus_batches(
                    tokenizer,
                    config,
                    inputs.data,
                    num_tokens=blockwise.num_tokens,
                    out=work_dir / "blockwise-tokens.bin",
                    batch_size=blockwise.batch_size,
                )
                metrics = student.train_blockwise(model, teacher, config, batches, context, num_steps=blockwise_steps)
            if config.has_taught_loss:  # at every position; tau squared keeps the gradient's size
                loss_fn = student.taught_loss_fn(
                    model, teacher, config, stack, task_loss_weight=config.task_loss_weight, variant="authors"
                )
            on_step = stack.enter_context(student.ready(model, config))
            metrics = metrics | training.train_on_corpus(
                model, tokenizer, config, inputs.data, context, loss_fn=loss_fn, on_step=on_step
            )
    checkpoint.save_model(model, tokenizer, out_dir)
    return metrics
