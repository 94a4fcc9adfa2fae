"""The layers of the engine in NumPy fp32: norms, ternary linear, INT8 embedding, rotary embedding, attention.

Ternary products are exact integers from the native kernels; everything else follows transformers' fp32 arithmetic.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.engine.kernels import ternary_matmul
from bitdistill_core.packing import Int8Rows

Floats = NDArray[np.float32]

ABSMAX_FLOOR = np.float32(1e-5)
ATTENTION_BLOCK = 128  # queries at once: bounds the score matrix
HEAD_BLOCK = 8192  # vocabulary rows dequantised at once


def rms_norm(x: Floats, weight: Floats, eps: float, weight_offset: float = 0.0) -> Floats:
    """(weight + weight_offset) * x / sqrt(mean(x^2) + eps), over the last axis."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    scaled = x * (np.float32(1) / np.sqrt(mean_square + np.float32(eps)))
    return scaled * (weight + np.float32(weight_offset)) if weight_offset else weight * scaled


def quantize_activation(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """x_int8 = clip(round(x * 127 / absmax), -128, 127) and activation_scale = absmax / 127 (T, 1), per token.

    BitDistill Eq. 3. Rounds half to even; the absmax has a floor of 1e-5.
    """
    absmax = np.maximum(np.max(np.abs(x), axis=-1, keepdims=True), ABSMAX_FLOOR)
    x_int8 = np.clip(np.rint(x * (np.float32(127) / absmax)), -128, 127).astype(np.int8)
    return x_int8, absmax / np.float32(127)


class PackedBitLinear:
    """y = activation_scale * weight_scale * (x_int8 @ w_ternary^T) + bias, x normed first where SubLN says so."""

    def __init__(
        self, tensors: dict[str, np.ndarray], name: str, n: int, *, sub_norm_eps: float, kernel: str, num_threads: int
    ) -> None:
        self.n = n
        self.w_packed = tensors[f"{name}.w_packed"]
        self.weight_scale = np.float32(tensors[f"{name}.weight_scale"])
        self.bias = tensors.get(f"{name}.bias")
        self.input_norm = tensors.get(f"{name}.input_norm.weight")
        self.sub_norm_eps = sub_norm_eps
        self.kernel = kernel
        self.num_threads = num_threads

    def __call__(self, x: Floats) -> Floats:
        """(T, K) to (T, N)."""
        if self.input_norm is not None:
            x = rms_norm(x, self.input_norm, self.sub_norm_eps)
        x_int8, activation_scale = quantize_activation(x)
        sums = ternary_matmul(x_int8, self.w_packed, self.n, kernel=self.kernel, num_threads=self.num_threads)
        y = sums.astype(np.float32) * (activation_scale * self.weight_scale)
        return y if self.bias is None else y + self.bias


def embed(rows: Int8Rows, ids: NDArray[np.int64]) -> Floats:
    """(T, D) rows of an INT8 embedding: row_scale * w_int8."""
    return rows.w_int8[ids].astype(np.float32) * rows.row_scale[ids, None]


def project_to_vocabulary(rows: Int8Rows, hidden: Floats) -> Floats:
    """(T, V) logits hidden @ (row_scale * w_int8)^T, dequantising a block of the vocabulary at a time."""
    vocab_size = len(rows.row_scale)
    logits = np.empty((len(hidden), vocab_size), np.float32)
    for begin in range(0, vocab_size, HEAD_BLOCK):
        block = slice(begin, min(begin + HEAD_BLOCK, vocab_size))
        np.matmul(hidden, rows.w_int8[block].astype(np.float32).T, out=logits[:, block])
    logits *= rows.row_scale
    return logits


def softcap(x: Floats, cap: float | None) -> Floats:
    """cap * tanh(x / cap), or x if there is no cap."""
    return x if cap is None else np.tanh(x / np.float32(cap)) * np.float32(cap)


def activate(x: Floats, activation: str) -> Floats:
    """SiLU, x / (1 + e^-x), or GELU by its tanh approximation."""
    if activation == "silu":
        with np.errstate(over="ignore"):  # e^-x = inf gives the right limit, -0
            denominator: Floats = np.exp(-x) + np.float32(1)
        return x / denominator
    tanh: Floats = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))
    return x * np.float32(0.5) * (tanh + np.float32(1))


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> Floats:
    """(head_dim / 2,) rotary frequencies 1 / theta^(2i / head_dim), scaled as `linear` or `llama3` says."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Floats = np.float32(1) / np.power(np.float32(rope["rope_theta"]), exponents)
    if rope["rope_type"] == "linear":
        return frequencies / np.float32(rope["factor"])
    if rope["rope_type"] == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: Floats, rope: dict[str, Any]) -> Floats:
    """Long wavelengths slowed by `factor`, short ones kept, interpolated between (Llama 3.1)."""
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
    slowed = np.where(wavelengths > context / low, frequencies / rope["factor"], between)
    return np.where(wavelengths < context / high, frequencies, slowed).astype(np.float32)


def rotation(frequencies: Floats, first_position: int, num_tokens: int) -> tuple[Floats, Floats]:
    """cos and sin (T, 1, head_dim / 2) of `num_tokens` positions from `first_position`."""
    positions = np.arange(first_position, first_position + num_tokens, dtype=np.float32)
    angles = (positions[:, None] * frequencies)[:, None, :]
    return np.cos(angles), np.sin(angles)


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary embedding of (T, H, head_dim): element i pairs with i + head_dim / 2, as in transformers."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def causal_attention(
    queries: Floats, keys: Floats, values: Floats, *, first_position: int, scale: float, window: int | None
) -> Floats:
    """(T, H * d) softmax(scale * Q K^T) V, each token over the positions up to its own.

    Args:
        queries: (T, H, d), of the positions from `first_position`.
        keys, values: (Hkv, S, d) with S = first_position + T; H / Hkv neighbouring heads share one.
        window: a token sees this many positions, itself included; None sees all.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[0]
    grouped = queries.transpose(1, 0, 2).reshape(num_kv_heads, num_heads // num_kv_heads, num_tokens, head_dim)
    out = np.empty_like(grouped)
    for begin in range(0, num_tokens, ATTENTION_BLOCK):
        end = min(begin + ATTENTION_BLOCK, num_tokens)
        first_key = 0 if window is None else max(0, first_position + begin - window + 1)
        last_key = first_position + end
        block = grouped[:, :, begin:end].reshape(num_kv_heads, -1, head_dim)
        scores = np.matmul(block, keys[:, first_key:last_key].transpose(0, 2, 1)) * np.float32(scale)
        scores = scores.reshape(num_kv_heads, -1, end - begin, last_key - first_key)
        distance = np.arange(first_position + begin, last_key)[:, None] - np.arange(first_key, last_key)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = np.where(hidden, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        block_out = np.matmul(weights.reshape(num_kv_heads, -1, last_key - first_key), values[:, first_key:last_key])
        out[:, :, begin:end] = block_out.reshape(num_kv_heads, -1, end - begin, head_dim)
    return out.transpose(2, 0, 1, 3).reshape(num_tokens, num_heads * head_dim)
