"""The machine: which device computes, with how many threads, and the C library's way with memory."""

import ctypes

import torch

from bitdistill_core.config import RuntimeConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def prepare_runtime(config: RuntimeConfig) -> torch.device:
    """The device to compute on; sets PyTorch's thread count and the C library's way with memory as side effects.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    _keep_freed_memory()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "runtime.device=cuda needs a CUDA GPU that PyTorch sees; found none; set runtime.device to auto"
        )
    use_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks instead of giving them back to the system.

    A training step frees and allocates the same tensors again; faulting their pages in anew took a third of the time
    of a step on a CPU. Elsewhere than on glibc nothing happens.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
