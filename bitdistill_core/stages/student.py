"""What `pretrain` and `distill` share: how a student is trained by a teacher, block by block and as a whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core import checkpoint, losses, train
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.block_outputs import captured_blocks, hidden_kd_loss, require_same_blocks
from bitdistill_core.blockwise import read_block_metrics, take_over_frame, train_blocks
from bitdistill_core.choices import LossVariant
from bitdistill_core.config import DistillConfig, PretrainConfig
from bitdistill_core.manifest import Metrics
from bitdistill_core.quantize.latent import latent_weight
from bitdistill_core.quantize.weight import quantize_weight
from bitdistill_core.replay import replayed_decoder
from bitdistill_core.stages import training
from bitdistill_core.stages.training import Context

OnStep = Callable[[int, int], None]  # (step, num_steps)


def load_teacher(
    directory: Path,
    student: PreTrainedModel,
    config: PretrainConfig | DistillConfig,
    context: Context,
    stack: ExitStack,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that teaches until `stack` closes: on the device, its weights in the stage's precision, no gradients.

    Where it teaches block by block, the student has its embeddings, final norm and head from here on. Buffers stay in
    float32: in bfloat16 the frequencies of rotary positions would be off by up to 0.4%.
    """
    teacher, tokenizer = checkpoint.load_model(directory)
    if config.blockwise.num_epochs:
        require_same_blocks(student.config, teacher.config, f"{context.name}.blockwise")
        take_over_frame(student, teacher)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(train.compute_dtype(config.precision))
    nn.Module.to(teacher.requires_grad_(False), context.device)
    stack.enter_context(replayed_decoder(teacher, context.device))
    return teacher, tokenizer


def taught_loss_fn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: PretrainConfig | DistillConfig,
    stack: ExitStack,
    *,
    task_loss_weight: float = 1.0,
    variant: LossVariant,
    attention_kd: Callable[[losses.Batch], Tensor] | None = None,
) -> train.LossFn:
    """Cross-entropy, logits and block outputs by the weights in `config`, and `attention_kd` as it comes.

    What is captured of both models is captured until `stack` closes.
    """
    if config.hidden_kd_weight:
        require_same_blocks(student.config, teacher.config, "hidden_kd_weight")
        ours, theirs = stack.enter_context(captured_blocks(student)), stack.enter_context(captured_blocks(teacher))

    def loss_fn(batch: losses.Batch) -> train.LossParts:
        with torch.no_grad():
            teacher_hidden = losses.hidden_states(teacher, batch)
        hidden = losses.hidden_states(student, batch)
        parts = {}
        if task_loss_weight:
            parts["task_loss"] = task_loss_weight * losses.task_loss(student, hidden, batch)
        if config.logits_kd_weight:
            parts["logits_kd"] = config.logits_kd_weight * losses.logits_kd_loss(
                student, hidden, teacher, teacher_hidden, batch, kd_temperature=config.kd_temperature, variant=variant
            )
        if attention_kd is not None:
            parts["attention_kd"] = attention_kd(batch)
        if config.hidden_kd_weight:
            parts["hidden_kd"] = config.hidden_kd_weight * hidden_kd_loss(ours, theirs, batch)
        return parts

    return loss_fn


def require_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where a student cannot learn the teacher's next tokens."""
    if student.get_vocab() != teacher.get_vocab():
        raise ValueError(
            f"teacher and student must share a vocabulary; got sizes {len(teacher)} and {len(student)}; take a teacher "
            "of the same family"
        )


def train_blockwise(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: PretrainConfig | DistillConfig,
    batches: Callable[[int], Sequence[losses.Batch]],
    context: Context,
    *,
    num_steps: int,
) -> Metrics:
    """Every block of the student on its teacher's output, in place, before the student is trained as a whole.

    Takes the first steps of `batches`, at most `num_steps` and `blockwise.num_tokens`; at least one.
    """
    if train.has_checkpoint(context.work_dir):  # the training that follows has begun
        return read_block_metrics(context.work_dir / "blockwise")
    steps: list[Sequence[losses.Batch]] = []
    num_tokens = 0
    for step in range(num_steps):
        micro_batches = batches(step)
        num_tokens += micro_batches[0].totals.num_tokens
        if steps and num_tokens > config.blockwise.num_tokens:
            break
        steps.append(micro_batches)
    own = replace(context, name=f"{context.name}.blockwise", work_dir=context.work_dir / "blockwise")
    options = training.options(config, own)
    options.update(config.blockwise.model_dump(include={"num_epochs", "learning_rate", "channel_weights"}))
    if config.blockwise.batch_size:  # as many sequences between two reports, and two checkpoints, as in the stage
        for key in ("report_every", "checkpoint_every"):
            options[key] = max(1, options[key] * config.batch_size // config.blockwise.batch_size)
    return train_blocks(student, teacher, steps, **options)


@torch.no_grad()
def clear_thresholds(model: PreTrainedModel, margin: float) -> None:
    """Moves the latent weights of every BitLinear `margin` scales away from the thresholds; codes and scales stay.

    Training leaves weights piled up at the thresholds (oscillation: arXiv 2203.11086), where the first step of a fresh
    optimiser, of the same length for all, turns thousands of codes at once.

    Raises:
        ValueError: another scale than absmean.
    """
    for layer in (module for module in model.modules() if isinstance(module, BitLinear)):
        quantizer = layer.quantizer
        if quantizer.scale_rule != "absmean":
            raise ValueError(
                f"threshold_margin needs scale_rule=absmean; got scale_rule={quantizer.scale_rule}; set it to 0"
            )
        codes, scale = quantize_weight(layer.weight, quantizer)
        layer.weight.copy_(latent_weight(layer.weight, codes, scale, quantizer, margin=margin))


@contextmanager
def quantization_warmup(model: PreTrainedModel, share: float) -> Iterator[OnStep | None]:
    """A callback for `train.fit` that raises the hardness of every BitLinear from 0 to 1 over `share` of the steps.

    The lambda warm-up W + lambda (Q(W) - W). Afterwards the model is fully quantised. None where `share` is 0.
    """
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]

    def on_step(step: int, num_steps: int) -> None:
        hardness = min(1.0, (step + 1) / max(1, round(share * num_steps)))
        for layer in layers:
            layer.hardness = hardness

    try:
        yield on_step if share else None
    finally:
        for layer in layers:
            layer.hardness = 1.0


@contextmanager
def ready(student: PreTrainedModel, config: PretrainConfig | DistillConfig) -> Iterator[OnStep | None]:
    """For the training of the whole student: its weights away from the thresholds, and the warm-up's callback."""
    if config.threshold_margin:
        clear_thresholds(student, config.threshold_margin)
    with quantization_warmup(student, config.quantization_warmup) as on_step:
        yield on_step
