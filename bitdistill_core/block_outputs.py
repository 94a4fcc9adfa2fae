"""The outputs of a decoder's blocks, captured by hooks, and the distance between a student's and its teacher's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from bitdistill_core.losses import Batch
from bitdistill_core.replay import observed


@contextmanager
def captured_blocks(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that every forward pass inside the context fills with each block's output, (B, T, D)."""
    outputs: list[Tensor] = []

    def begin(module: nn.Module, inputs: Any) -> None:
        outputs.clear()

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    layers = model.get_decoder().layers
    handles = [layers[0].register_forward_pre_hook(begin), *(layer.register_forward_hook(keep) for layer in layers)]
    try:
        with observed(model, outputs):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()


def require_same_blocks(student: PretrainedConfig, teacher: PretrainedConfig, key: str) -> None:
    """Raises ValueError unless both have as many blocks and the same width."""
    shapes = [(int(config.num_hidden_layers), int(config.hidden_size)) for config in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{key} compares block with block: teacher and student need the same depth and width; got "
            f"student={shapes[0]}, teacher={shapes[1]}; turn it off"
        )


def hidden_kd_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch, channel_weights: Tensor | None = None
) -> Tensor:
    """Relative squared distance of block outputs, () fp32: |w (h_s - h_t)|^2 / |w h_t|^2, mean over blocks and tokens.

    Relative to each token, since some tokens of a language model have outputs hundreds of times the usual size.

    Args:
        channel_weights: w, (D) fp32; None: 1.
    """
    is_token = batch.is_token
    total = batch.lengths.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours.float(), theirs.detach().float()
        if channel_weights is not None:
            ours, theirs = ours * channel_weights, theirs * channel_weights
        error = (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_(min=1e-6)
        total = total + (error * is_token).sum()
    return total / (len(student) * batch.totals.num_tokens)
