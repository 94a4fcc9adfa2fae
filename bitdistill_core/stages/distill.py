"""Stage 3 of BitDistill, `distill`: the fine-tuned teacher distilled into the ternary student (Eq. 13).

loss = task_loss + logits_kd_weight * logits_kd + attention_kd_weight * attention_kd, and optionally the distance of
the blocks' outputs. The teacher runs live, without gradient; where every weight is 0 there is none. Embedding and head
of the result are rounded to the INT8 grid of the packed file.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from bitdistill_core import checkpoint, losses
from bitdistill_core.config import DistillConfig
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.relations import captured
from bitdistill_core.stages import student, training
from bitdistill_core.stages.training import Context


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    student: Path
    teacher: Path
    data: Path = field(metadata={"reads": ("examples/train.parquet", "task.json")})


def run(
    config: DistillConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes the distilled student.

    Raises:
        ValueError: teacher and student of different vocabularies, a layer that does not exist, or relation heads that
            do not divide the width of Q, K and V.
    """
    model, tokenizer = checkpoint.load_model(inputs.student)
    context = Context("distill", work_dir, report, device)
    metrics: Metrics = {}
    with ExitStack() as stack:
        loss_fn = None
        if config.is_taught:
            teacher, teacher_tokenizer = student.load_teacher(inputs.teacher, model, config, context, stack)
            student.require_same_vocabulary(tokenizer, teacher_tokenizer)
            if config.blockwise.num_epochs:
                batches = training.task_batches(
                    model,
                    tokenizer,
                    config,
                    inputs.data,
                    batch_size=config.blockwise.batch_size,
                    without_contained=config.blockwise.drop_contained,
                )
                metrics = student.train_blockwise(
                    model, teacher, config, batches, context, num_steps=batches.steps_per_epoch
                )
            if config.has_taught_loss:
                attention_kd = _attention_kd(config, model, teacher, stack) if config.attention_kd_weight else None
                loss_fn = student.taught_loss_fn(
                    model, teacher, config, stack, variant=config.loss, attention_kd=attention_kd
                )
        metrics = metrics | training.train_on_task(
            model,
            tokenizer,
            config,
            inputs.data,
            context,
            loss_fn=loss_fn,
            on_step=stack.enter_context(student.ready(model, config)),
            grad_norm_every=config.grad_norm_every,
            balance_grad_norms=config.balance_grad_norms,
        )
    training.round_embeddings(model)
    checkpoint.save_model(model, tokenizer, out_dir)
    return metrics


def _attention_kd(
    config: DistillConfig, model: PreTrainedModel, teacher: PreTrainedModel, stack: ExitStack
) -> Callable[[losses.Batch], Tensor]:
    """The weighted term of Eq. 10-12; states of both models are captured until `stack` closes."""
    pairs = layer_pairs(config, model.config, teacher.config)
    student_states = stack.enter_context(captured(model, [s for s, _ in pairs]))
    teacher_states = stack.enter_context(captured(teacher, [t for _, t in pairs]))

    def attention_kd(batch: losses.Batch) -> Tensor:
        return config.attention_kd_weight * losses.attention_kd_loss(
            student_states,
            teacher_states,
            pairs,
            batch,
            num_relation_heads=config.num_relation_heads,
            variant=config.loss,
        )

    return attention_kd


def layer_pairs(config: DistillConfig, own: PretrainedConfig, teacher: PretrainedConfig) -> list[tuple[int, int]]:
    """(student layer, teacher layer), counted from 0. Negative indices count from the end of each model; none: all.

    Raises:
        ValueError: a layer that a model does not have, or relation heads that do not divide its width.
    """

    def resolve(layer: int, model: PretrainedConfig, key: str) -> int:
        depth = int(model.num_hidden_layers)
        if not -depth <= layer < depth:
            raise ValueError(f"{key} must name layers of a model with num_layers={depth}; got {layer}")
        return layer % depth

    for model in (own, teacher):
        head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        for name, heads in (("query", model.num_attention_heads), ("key", model.num_key_value_heads)):
            if heads * head_dim % config.num_relation_heads:
                raise ValueError(
                    f"distill.num_relation_heads must divide the {name} width of teacher and student; got "
                    f"width={heads * head_dim}, num_relation_heads={config.num_relation_heads}"
                )
    layers = config.distill_layers or range(int(own.num_hidden_layers))
    return [
        (resolve(s, own, "distill.distill_layers"), resolve(t, teacher, "distill.teacher_layers"))
        for s, t in zip(layers, config.teacher_layers or layers, strict=True)
    ]
