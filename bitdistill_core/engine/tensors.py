"""Which tensors a packed file holds, and the checks of their names, shapes and values."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitdistill_core.choices import Encoding
from bitdistill_core.engine.config import EngineConfig, linear_layers, norm_layers
from bitdistill_core.panels import LINE_K, base3_shape, next_shape, packed_shape, rest_shape, scan_shape

TOKENIZER, TASK = BLOBS = ("tokenizer.json", "task.json")

UINT8, FLOAT32 = np.dtype(np.uint8), np.dtype("<f4")

# by encoding, the end of the names of the codes' tensors; base 3 is three weights in five bits
CODES: dict[Encoding, str] = {"2bit": "w_packed", "base3": "w_base3"}
SEARCHED = ("scan", "next")  # of an output head, what finds its largest logits
ROW_NUMBERS = ("row_scale", "row_norm", "scan_error", "next_error")  # of an embedding, one a row
COLUMN_NUMBERS = ("column_scale", "mean")  # one a column
Expected = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


def encoding_of(tensors: Mapping[str, np.ndarray]) -> Encoding:
    """How the tensors of a packed file hold ternary codes."""
    return "base3" if any(name.endswith(CODES["base3"]) for name in tensors) else "2bit"


def check_tensors(source: str, config: EngineConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError, naming `source`, unless `tensors` are those of `config`."""
    encoding = encoding_of(tensors)
    expected = _expected_tensors(config, encoding, None)
    scales = [f"{name}.weight_scale" for name in linear_layers(config)]
    missing = [name for name in (*expected, *scales, *BLOBS) if name not in tensors]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors that its config calls for; first missing tensor={missing[0]}"
        )
    known = {*expected, *scales, *BLOBS}
    unexpected = [name for name in tensors if name not in known]
    if unexpected:
        raise ValueError(
            f"{source} has {len(unexpected)} tensors unknown to its config; first unexpected tensor={unexpected[0]}"
        )
    block_size = _check_scales(source, config, tensors)
    for name, (dtype, shape) in _expected_tensors(config, encoding, block_size).items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{source} does not fit its config: tensor={name} needs dtype={dtype} shape={shape}; "
                f"got dtype={tensor.dtype} shape={tensor.shape}"
            )


def check_numbers(source: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError, naming `source`, for NaN or infinity in a tensor, or scales or norms that bound nothing."""
    for name, tensor in tensors.items():
        if tensor.dtype == FLOAT32 and not np.isfinite(tensor).all():
            raise ValueError(
                f"a packed model holds finite numbers only; got NaN or infinity in tensor={name} ({source})"
            )
        if name.endswith((*ROW_NUMBERS, "column_scale")) and tensor.min() < 0:
            raise ValueError(
                f"scales and norms of an embedding are at least 0; got {tensor.min()} in tensor={name} ({source}); "
                "pack it again"
            )
        if name.endswith("row_scale") and not _is_moderate(tensor).all():
            raise ValueError(
                f"row scales of an embedding are 0 or from 1e-30 to 1e30; got {tensor[~_is_moderate(tensor)][0]} in "
                f"tensor={name} ({source}); pack it again"
            )


def _is_moderate(scales: np.ndarray) -> np.ndarray:
    """Whether sums of products with them neither overflow float32 nor vanish in it."""
    return (scales == 0) | ((scales >= 1e-30) & (scales <= 1e30))


def _expected_tensors(config: EngineConfig, encoding: Encoding, block_size: int | None) -> Expected:
    """Name to dtype and shape of every tensor of a packed file but the weight scales and the blobs.

    `block_size`: of weights that share a scale, where a row has several.
    """
    expected: Expected = {}
    for name, linear in linear_layers(config).items():
        if encoding == "base3":
            num_blocks = linear.k // block_size if block_size else 1
            expected[f"{name}.w_base3"] = UINT8, base3_shape(linear.n, linear.k, num_blocks)
        else:
            expected[f"{name}.w_packed"] = UINT8, packed_shape(linear.n, linear.k)
        if linear.has_bias:
            expected[f"{name}.bias"] = FLOAT32, (linear.n,)
        if linear.has_input_norm:
            expected[f"{name}.input_norm.weight"] = FLOAT32, (linear.k,)
    for name, size in norm_layers(config).items():
        expected[f"{name}.weight"] = FLOAT32, (size,)
    for name in dict.fromkeys(("model.embed_tokens", config.head)):  # one where they are tied
        expected[f"{name}.scan"] = UINT8, scan_shape(config.vocab_size, config.hidden_size)
        expected[f"{name}.next"] = UINT8, next_shape(config.vocab_size, config.hidden_size)
        expected[f"{name}.rest"] = UINT8, rest_shape(config.vocab_size, config.hidden_size)
        for scalars in ROW_NUMBERS:
            expected[f"{name}.{scalars}"] = FLOAT32, (config.vocab_size,)
        for scalars in COLUMN_NUMBERS:
            expected[f"{name}.{scalars}"] = FLOAT32, (config.hidden_size,)
    return expected


def _check_scales(source: str, config: EngineConfig, tensors: Mapping[str, np.ndarray]) -> int | None:
    """The block size: scales are (), (N,) or (N, K / block_size), with one for all layers, as some share an input."""
    first: tuple[str, int | None] | None = None
    for name, layer in linear_layers(config).items():
        scale = tensors[f"{name}.weight_scale"]
        block_size = None
        if scale.dtype != FLOAT32 or not (
            scale.shape in ((), (layer.n,)) or _is_of_blocks(scale.shape, layer.n, layer.k)
        ):
            raise ValueError(
                f"{source} does not fit its config: tensor={name}.weight_scale needs dtype=float32 and shape=(), "
                f"({layer.n},) or ({layer.n}, a divisor of {layer.k}); got dtype={scale.dtype} shape={scale.shape}"
            )
        if scale.ndim == 2:
            block_size = layer.k // scale.shape[1]
            if block_size % LINE_K:
                raise ValueError(
                    f"weights that share a scale are packed in blocks of a multiple of {LINE_K}; got linear={name} "
                    f"k={layer.k} block_size={block_size} ({source}); choose another block size for the student"
                )
        first = first or (name, block_size)
        if block_size != first[1]:
            raise ValueError(
                f"a packed model has one block size; got linear={first[0]} block_size={first[1]} and linear={name} "
                f"block_size={block_size} ({source}); quantise every layer alike"
            )
    return first[1] if first else None


def _is_of_blocks(shape: tuple[int, ...], n: int, k: int) -> bool:
    return len(shape) == 2 and shape[0] == n and shape[1] > 0 and k % shape[1] == 0
