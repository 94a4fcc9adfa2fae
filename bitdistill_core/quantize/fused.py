"""Small functions of tensors compiled to a kernel or two where they run on a GPU.

A quantiser is some ten operations on each element, and a student quantises every weight and every input at every step.
PyTorch's own variable TORCH_COMPILE_DISABLE=1 turns it off.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The function, compiled for a first argument on a CUDA device and as it is for others."""
    compiled = torch.compile(function)

    @wraps(function)
    def call(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return compiled(first, *args, **kwargs) if first.is_cuda else function(first, *args, **kwargs)

    return call
