"""Hooks on the blocks of a model: the test's own, and how many there are."""

from torch import Tensor, nn
from transformers import PreTrainedModel


def block_outputs(model: PreTrainedModel, input_ids: Tensor) -> list[Tensor]:
    """What each block returns, by a hook of the test's own on each."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.get_decoder().layers
    ]
    model(input_ids)
    for handle in handles:
        handle.remove()
    return outputs


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
