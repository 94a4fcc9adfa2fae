"""The native ternary kernels, validated: Python checks types, shapes and memory order, C++ trusts its caller."""

import os

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.panels import LINE_BYTES, LINE_K, PANEL_ROWS

try:
    from bitdistill_core.engine import _native
except ImportError as error:
    raise ImportError(
        f"the native extension bitdistill_core.engine._native cannot be imported ({error}); "
        "build it with: pip install --no-build-isolation -e ."
    ) from error

MAX_THREADS = 1024


def available_kernels() -> list[str]:
    """Kernels this processor can run, fastest first; "scalar" is always among them."""
    return _native.available_kernels()


def built_kernels() -> dict[str, str]:
    """Kernels of this build, fastest first, and what a processor must have for each."""
    return dict(_native.built_kernels())


def active_kernel() -> str:
    """The kernel used unless another is asked for."""
    return available_kernels()[0]


def resolve_kernel(kernel: str | None) -> str:
    """`kernel` if this processor has it; the active one for None."""
    if kernel is None:
        return active_kernel()
    if kernel not in available_kernels():
        names = ", ".join(available_kernels())
        raise ValueError(f"kernel must be one of {names} on this processor; got kernel={kernel}")
    return kernel


def resolve_num_threads(num_threads: int) -> int:
    """A positive number of threads: 0 means every core this process may use."""
    if not 0 <= num_threads <= MAX_THREADS:
        raise ValueError(f"num_threads must be from 0 (every core) to {MAX_THREADS}; got num_threads={num_threads}")
    if num_threads > 0:
        return num_threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ternary_matmul(
    x: NDArray[np.int8], w_packed: NDArray[np.uint8], n: int, *, kernel: str | None = None, num_threads: int = 1
) -> NDArray[np.int32]:
    """Exact integer sums out[t, n] = sum over k of x[t, k] * w_ternary[n, k].

    Args:
        x: (T, K) int8, C-contiguous. K may be shorter than the packed K by less than 16: it is padded with zeros.
        w_packed: (ceil(N / 16), ceil(K / 16), 64) uint8, C-contiguous, the layout of `bitdistill_core.packing`.
        n: N, rows of the unpadded matrix.
        num_threads: 0 for every core. The sums are the same at any number.
    Returns:
        (T, N) int32; a view that drops the padded rows.
    """
    _check_array("x", x, np.dtype(np.int8), 2)
    _check_array("w_packed", w_packed, np.dtype(np.uint8), 3)
    num_panels, num_lines, line_bytes = w_packed.shape
    if line_bytes != LINE_BYTES:
        raise ValueError(f"w_packed must have lines of {LINE_BYTES} bytes; got shape={w_packed.shape}")
    if not (num_panels - 1) * PANEL_ROWS < n <= num_panels * PANEL_ROWS:
        raise ValueError(f"n must fit the {num_panels} panels of 16 rows in w_packed; got n={n}")
    padded_k = num_lines * LINE_K
    if not padded_k - LINE_K < x.shape[1] <= padded_k:
        raise ValueError(f"x must fit w_packed, packed for K up to {padded_k}; got x of shape={x.shape}")
    if padded_k > _native.MAX_K:
        raise ValueError(f"the sums are exact for K up to {_native.MAX_K}; got K={padded_k}")
    if x.shape[1] < padded_k:
        x = np.pad(x, ((0, 0), (0, padded_k - x.shape[1])))
    out = np.empty((x.shape[0], num_panels * PANEL_ROWS), np.int32)
    _native.ternary_matmul(x, w_packed, out, resolve_kernel(kernel), resolve_num_threads(num_threads))
    return out[:, :n]


def _check_array(name: str, array: np.ndarray, dtype: np.dtype, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        is_array = isinstance(array, np.ndarray)
        got = f"dtype={array.dtype} shape={array.shape}" if is_array else f"type={type(array).__name__}"
        raise ValueError(f"{name} must be a NumPy array of dtype {dtype} with {ndim} dimensions; got {got}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous; got strides={array.strides}; use np.ascontiguousarray")
