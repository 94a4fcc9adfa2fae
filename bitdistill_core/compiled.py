"""Decoder blocks compiled for a GPU: one by one a block's small operations cost more to start than to run.

All blocks of a model share what is compiled, whatever the length of their sequences. PyTorch's own variable
TORCH_COMPILE_DISABLE=1 turns it off. Not for evaluation, which changes its weights, nor for a CPU.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

RECOMPILE_LIMIT = 64  # student and teacher, with and without gradient, in each precision: more than PyTorch's 8


def compile_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Compiles the decoder blocks of a model that is trained or teaches on a CUDA device; nothing on another.

    Hooks on a block run outside of what is compiled, as they do on one that is not.
    """
    if device.type != "cuda":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for block in model.get_decoder().layers:
        if not _is_compiled(block):
            block.forward = torch.compile(block.forward, dynamic=True)


def _is_compiled(block: nn.Module) -> bool:
    return "forward" in vars(block)
