"""The native ternary kernels, validated: Python checks types, shapes and memory order, C++ trusts its caller."""

import os

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.engine.config import MAX_THREADS
from bitdistill_core.panels import LINE_K, PANEL_ROWS, base3_shape, empty_lines, packed_shape, panel_scales

try:
    from bitdistill_core.engine import _native
except ImportError as error:
    raise ImportError(
        f"the native extension bitdistill_core.engine._native cannot be imported ({error}); "
        "build it with: pip install --no-build-isolation -e ."
    ) from error


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


def streams_base3(kernel: str) -> bool:
    """Whether `kernel` multiplies `w_base3` as it lies in the file; others need `expand_base3`."""
    return _native.streams_base3(kernel)


def is_sound(codes: NDArray[np.uint8], n: int, k: int, num_blocks: int = 1) -> bool:
    """Whether `w_packed` or `w_base3` of N = n by K = k holds nothing but ternary codes."""
    _check_codes(codes, n, k, num_blocks)
    return _native.is_sound(codes, n, k, num_blocks)


def expand_base3(
    w_base3: NDArray[np.uint8], n: int, k: int, num_blocks: int = 1, *, w_packed: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The `w_packed` that `w_base3` holds, in the array given or a new one, on a 64-byte address.

    Wrong codes, see `is_sound`, give wrong codes.
    """
    _check_array("w_base3", w_base3, np.dtype(np.uint8), 2)
    _check_codes(w_base3, n, k, num_blocks)
    if w_packed is None:
        (w_packed,) = empty_lines([packed_shape(n, k)])
    _check_codes(w_packed, n, k, num_blocks)
    _native.expand_base3(w_base3, num_blocks, w_packed, k)
    return w_packed


def ternary_matmul(
    x: NDArray[np.int8], codes: NDArray[np.uint8], n: int, *, kernel: str | None = None, num_threads: int = 1
) -> NDArray[np.int32]:
    """Exact integer sums out[t, n] = sum over k of x[t, k] * w_ternary[n, k].

    Args:
        x: (T, K) int8, C-contiguous.
        codes: `w_packed`, or `w_base3` for a kernel that streams it, C-contiguous: the layouts of
            `bitdistill_core.panels`, which hold nothing but ternary codes (`is_sound`).
        n: N, rows of the unpadded matrix.
        num_threads: 0 for every core. The sums are the same at any number.
    Returns:
        (T, N) int32; a view that drops the padded rows.
    """
    _check_array("x", x, np.dtype(np.int8), 2)
    _check_codes(codes, n, x.shape[1], 1)
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % LINE_K)))
    out = np.empty((x.shape[0], len(codes) * PANEL_ROWS), np.int32)
    _native.ternary_matmul(x, codes, out, _kernel_for(codes, kernel), resolve_num_threads(num_threads))
    return out[:, :n]


def ternary_linear(
    x: NDArray[np.float32],
    codes: NDArray[np.uint8],
    weight_scale: NDArray[np.float32],
    n: int,
    *,
    kernel: str | None = None,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """A linear layer as the model computes it: out[t, n] = x_scale[t] * sum over blocks of weight_scale * exact sum.

    Args:
        x: (T, K), rounded here to x_scale[t] * x_int8, x_scale = absmax / 127.
        codes: as in `ternary_matmul`.
        weight_scale: (), (N,), or (N, G) where K / G is a multiple of 16.
    Returns:
        (T, N); blocks add up in float32, in their order. The same bits for a token alone and beside any others.
    """
    _check_array("x", x, np.dtype(np.float32), 2)
    blocks = weight_scale.shape[1:] if weight_scale.ndim == 2 else (1,)
    is_whole = blocks[0] == 1 or (blocks[0] > 0 and x.shape[1] % (blocks[0] * LINE_K) == 0)
    if weight_scale.dtype != np.float32 or weight_scale.shape not in ((), (n,), (n, *blocks)) or not is_whole:
        raise ValueError(
            f"weight_scale must be float32 of shape (), ({n},) or ({n}, G) with K / G a multiple of {LINE_K}; got "
            f"dtype={weight_scale.dtype} shape={weight_scale.shape} k={x.shape[1]}"
        )
    _check_codes(codes, n, x.shape[1], blocks[0])
    out = np.empty((x.shape[0], len(codes) * PANEL_ROWS), np.float32)
    scales = panel_scales(weight_scale, n)
    _native.ternary_linear(x, codes, scales, out, _kernel_for(codes, kernel), resolve_num_threads(num_threads))
    return out[:, :n]


def _kernel_for(codes: NDArray[np.uint8], kernel: str | None) -> str:
    """`kernel`, once it reads `codes`."""
    resolved = resolve_kernel(kernel)
    if codes.ndim == 2 and not streams_base3(resolved):
        raise ValueError(f"kernel={resolved} does not stream base 3; expand it with expand_base3")
    return resolved


def _check_codes(codes: NDArray[np.uint8], n: int, k: int, num_blocks: int) -> None:
    is_base3 = isinstance(codes, np.ndarray) and codes.ndim == 2
    _check_array("w_base3" if is_base3 else "w_packed", codes, np.dtype(np.uint8), 2 if is_base3 else 3)
    if not 0 < k <= _native.MAX_K:
        raise ValueError(f"the sums are exact for K from 1 to {_native.MAX_K}; got K={k}")
    if num_blocks < 1 or (num_blocks > 1 and k % (num_blocks * LINE_K)):
        raise ValueError(f"a block must be a multiple of {LINE_K} weights; got k={k} num_blocks={num_blocks}")
    shape = base3_shape(n, k, num_blocks) if is_base3 else packed_shape(n, k)
    if n < 1 or codes.shape != shape:
        raise ValueError(f"codes of n={n} k={k} in num_blocks={num_blocks} have shape={shape}; got shape={codes.shape}")


def _check_array(name: str, array: np.ndarray, dtype: np.dtype, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        is_array = isinstance(array, np.ndarray)
        got = f"dtype={array.dtype} shape={array.shape}" if is_array else f"type={type(array).__name__}"
        raise ValueError(f"{name} must be a NumPy array of dtype {dtype} with {ndim} dimensions; got {got}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous; got strides={array.strides}; use np.ascontiguousarray")
