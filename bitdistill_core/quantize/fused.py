"""Small functions of tensors compiled to a kernel or two where they run on a GPU.

A quantiser is some ten operations on each element, and a student quantises every weight and every input at every step.
PyTorch's own variable TORCH_COMPILE_DISABLE=1 turns it off.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from bitdistill_core.errors import one_line

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The function, compiled for a first argument on a CUDA device and as it is for others.

    Compiled, a division may be off by an ulp or two. Where nothing can be compiled (no C compiler, an old GPU) the
    function runs as it is, after a warning.
    """
    compiled = torch.compile(function, dynamic=True)
    works = True

    @wraps(function)
    def call(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal works
        if works and first.is_cuda:
            try:
                return compiled(first, *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # what a compiler can raise has many types
                works = False
                reason = one_line(error, 300)
                log.warning("quantisers run uncompiled, which is slower; a C compiler may be missing: %s", reason)
        return function(first, *args, **kwargs)

    return call
