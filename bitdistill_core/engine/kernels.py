"""The native ternary kernels, validated: Python checks types, shapes and memory order, C++ trusts its caller."""

import os

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.panels import LINE_BYTES, LINE_K, PANEL_ROWS, panel_scales

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
    padded_k = _check_packed(w_packed, n, x.shape)
    if x.shape[1] < padded_k:
        x = np.pad(x, ((0, 0), (0, padded_k - x.shape[1])))
    out = np.empty((x.shape[0], len(w_packed) * PANEL_ROWS), np.int32)
    _native.ternary_matmul(x, w_packed, out, resolve_kernel(kernel), resolve_num_threads(num_threads))
    return out[:, :n]


def ternary_linear(
    x: NDArray[np.float32],
    w_packed: NDArray[np.uint8],
    weight_scale: NDArray[np.float32],
    n: int,
    *,
    kernel: str | None = None,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """A linear layer as the model computes it: out[t, n] = x_scale[t] * sum over blocks of weight_scale * exact sum.

    Args:
        x: (T, K), rounded here to x_scale[t] * x_int8, x_scale = absmax / 127.
        w_packed: as in `ternary_matmul`.
        weight_scale: (), (N,), or (N, G) where K / G is a multiple of 16.
    Returns:
        (T, N); blocks add up in float32, in their order. The same bits for a token alone and beside any others.
    """
    _check_array("x", x, np.dtype(np.float32), 2)
    _check_packed(w_packed, n, x.shape)
    blocks = weight_scale.shape[1:] if weight_scale.ndim == 2 else (1,)
    is_whole = blocks[0] == 1 or (blocks[0] > 0 and x.shape[1] % (blocks[0] * LINE_K) == 0)
    if weight_scale.dtype != np.float32 or weight_scale.shape not in ((), (n,), (n, *blocks)) or not is_whole:
        raise ValueError(
            f"weight_scale must be float32 of shape (), ({n},) or ({n}, G) with K / G a multiple of {LINE_K}; got "
            f"dtype={weight_scale.dtype} shape={weight_scale.shape} k={x.shape[1]}"
        )
    out = np.empty((x.shape[0], len(w_packed) * PANEL_ROWS), np.float32)
    scales = panel_scales(weight_scale, n)
    _native.ternary_linear(x, w_packed, scales, out, resolve_kernel(kernel), resolve_num_threads(num_threads))
    return out[:, :n]


def _check_packed(w_packed: NDArray[np.uint8], n: int, x_shape: tuple[int, ...]) -> int:
    """The packed K of a matrix of n rows, once it fits x (T, K)."""
    _check_array("w_packed", w_packed, np.dtype(np.uint8), 3)
    num_panels, num_lines, line_bytes = w_packed.shape
    if line_bytes != LINE_BYTES:
        raise ValueError(f"w_packed must have lines of {LINE_BYTES} bytes; got shape={w_packed.shape}")
    if not (num_panels - 1) * PANEL_ROWS < n <= num_panels * PANEL_ROWS:
        raise ValueError(f"n must fit the {num_panels} panels of 16 rows in w_packed; got n={n}")
    padded_k = num_lines * LINE_K
    if not padded_k - LINE_K < x_shape[1] <= padded_k:
        raise ValueError(f"x must fit w_packed, packed for K up to {padded_k}; got x of shape={x_shape}")
    if padded_k > _native.MAX_K:
        raise ValueError(f"the sums are exact for K up to {_native.MAX_K}; got K={padded_k}")
    return padded_k


def _check_array(name: str, array: np.ndarray, dtype: np.dtype, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        is_array = isinstance(array, np.ndarray)
        got = f"dtype={array.dtype} shape={array.shape}" if is_array else f"type={type(array).__name__}"
        raise ValueError(f"{name} must be a NumPy array of dtype {dtype} with {ndim} dimensions; got {got}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous; got strides={array.strides}; use np.ascontiguousarray")
