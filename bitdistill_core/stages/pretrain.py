"""Stage 2 of BitDistill, `pretrain`: continued pre-training of the student through its quantised forward pass.

The paper's loss is cross-entropy (Eq. 7). The base model, which the student was made of, can teach in addition or
instead: its distribution of the next token, and the outputs of its blocks.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from bitdistill_core import checkpoint, losses
from bitdistill_core.block_outputs import captured_blocks, hidden_kd_loss, require_same_blocks
from bitdistill_core.config import PretrainConfig
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.stages import training
from bitdistill_core.train import LossFn, LossParts


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    student: Path
    base: Path
    data: Path


def run(
    config: PretrainConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes the student after `num_tokens` of the corpus; with num_tokens 0 the student as it came."""
    student, tokenizer = checkpoint.load_model(inputs.student)
    metrics: Metrics = {}
    if config.num_tokens:
        with ExitStack() as stack:
            loss_fn = None
            if config.logits_kd_weight or config.hidden_kd_weight:
                teacher, _ = checkpoint.load_model(inputs.base)
                nn.Module.to(teacher.requires_grad_(False), device, training.dtype_of(config))
                loss_fn = _teaching(config, student, teacher, stack)
            elif config.task_loss_weight != 1.0:
                raise ValueError(
                    "pretrain.task_loss_weight weighs cross-entropy against distillation; got "
                    f"task_loss_weight={config.task_loss_weight} without any; set it to 1.0"
                )
            on_step = stack.enter_context(training.quantization_warmup(student, config.quantization_warmup))
            metrics = training.train_on_corpus(
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


def _teaching(config: PretrainConfig, student: PreTrainedModel, teacher: PreTrainedModel, stack: ExitStack) -> LossFn:
    if config.hidden_kd_weight:
        require_same_blocks(student, teacher)
        ours, theirs = stack.enter_context(captured_blocks(student)), stack.enter_context(captured_blocks(teacher))

    def loss_fn(batch: losses.Batch) -> LossParts:
        with torch.no_grad():
            teacher_hidden = losses.hidden_states(teacher, batch)
        hidden = losses.hidden_states(student, batch)
        parts = {}
        if config.task_loss_weight:
            parts["task_loss"] = config.task_loss_weight * losses.task_loss(student, hidden, batch)
        if config.logits_kd_weight:
            parts["logits_kd"] = config.logits_kd_weight * losses.logits_kd_loss(
                student,
                hidden,
                teacher,
                teacher_hidden,
                batch,
                kd_temperature=config.kd_temperature,
                variant="authors",  # every position; tau squared keeps the gradient's size
            )
        if config.hidden_kd_weight:
            parts["hidden_kd"] = config.hidden_kd_weight * hidden_kd_loss(ours, theirs, batch)
        return parts

    return loss_fn
