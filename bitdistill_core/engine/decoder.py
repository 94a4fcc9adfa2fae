"""The native model of a packed file: the arrays and numbers that bitdistill_core/engine/native works on."""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.engine.config import SLIDING, EngineConfig, LinearLayer, linear_layers
from bitdistill_core.engine.kernels import _native, expand_base3, is_sound, streams_base3
from bitdistill_core.engine.memory import part_of
from bitdistill_core.engine.tensors import CODES, SEARCHED
from bitdistill_core.packing import HASH_THREADS, PackedModel
from bitdistill_core.panels import empty_lines, packed_shape, panel_scales

Floats = NDArray[np.float32]

KV_DTYPES = ("float32", "float16")
NOT_FINITE = (
    "a model must compute finite numbers; got NaN or infinity: its weights overflow float32 (train it again), or its "
    "keys and values float16 (take kv_dtype=float32)"
)


class Decoder:
    """All layers and the output head. Holds no state between calls: that is the cache."""

    def __init__(self, model: PackedModel, *, kernel: str, num_threads: int) -> None:
        self.model = model  # keeps the map and the file
        config = model.config
        # Read, not mapped, are norms and biases too: a mapped one may bring megabytes of its neighbours into memory.
        self.arrays = _linear_arrays(model, kernel, num_threads) | {
            name: model.read(name)
            for name in model.tensors
            if part_of(name) == "norms_biases_scales" and not name.endswith(".weight_scale")
        }
        streamed = [f"{config.head}.{part}" for part in SEARCHED]
        if not model.tensors[streamed[0]].flags.writeable:  # the map; filled with the first token that is generated
            copies = empty_lines([model.tensors[name].shape for name in streamed])
            self.arrays |= dict(zip(streamed, copies, strict=True))
        tensors = model.tensors | self.arrays
        embedding = _rows(model, "model.embed_tokens")
        self._native = _native.Model(
            config=_native_config(config),
            layers=_native_layers(config, tensors),
            final_norm=tensors["model.norm.weight"],
            embedding=embedding,
            head=embedding if config.tie_word_embeddings else _rows(model, config.head),
            head_scan=tensors[streamed[0]],
            head_next=tensors[streamed[1]],
            kernel=kernel,
            num_threads=num_threads,
        )

    def new_cache(self, capacity: int, kv_dtype: str = "float32") -> _native.KeyValueCache:
        """Keys and values of up to `capacity` positions of one sequence; memory is taken as they come."""
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}; got kv_dtype={kv_dtype}")
        return self._native.new_cache(capacity, kv_dtype == "float16")

    def forward(
        self,
        segments: Sequence[NDArray[np.int32]],
        outputs: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        cache: _native.KeyValueCache | None = None,
    ) -> Floats:
        """Final hidden states (len(outputs), padded D) of the tokens `outputs`, counted through all segments.

        Args:
            segments: token ids; tokens of different segments do not see each other.
            parents: for each segment the earlier segment it continues, or -1. None: no segment continues another.
            cache: of one sequence; then there is one segment, which follows the positions in the cache and joins them.
        """
        if cache is not None:
            _require_room(cache, len(segments[0]))
        self.model.require_unchanged()
        return self._native.forward(list(segments), list(parents or [-1] * len(segments)), list(outputs), cache)

    def row_logits(self, hidden: Floats, rows: Sequence[int]) -> Floats:
        """(T, len(rows)) logits of some tokens of the vocabulary. Raises ValueError where one is not finite."""
        self.model.require_unchanged()
        return require_finite(self._native.row_logits(hidden, list(rows)))

    def logits(self, hidden: Floats) -> Floats:
        """(T, V) logits. Raises ValueError where one is not finite."""
        self.model.require_unchanged()
        return require_finite(self._native.logits(hidden))

    def top(self, hidden: Floats, count: int) -> list[tuple[int, float]]:
        """The `count` largest (token, logit) of one hidden state (1, padded D), exactly those of `logits`.

        Equal ones are in the order of their ids; with a soft cap, logits that only the cap makes equal stay in order.
        """
        self.model.require_unchanged()
        return _require_any(self._native.top(hidden, count)[0])

    def step(self, token: int, cache: _native.KeyValueCache, count: int) -> list[tuple[int, float]]:
        """`top` behind one more token of the sequence in the cache, which it joins: `forward` and `top` in one call."""
        _require_room(cache, 1)
        self.model.require_unchanged()
        return _require_any(self._native.step(token, cache, count))

    def top_statistics(self, hidden: Floats, count: int) -> tuple[int, int]:
        """Of how many rows `top` read the sixth bit, and how many it read whole and computed in float32."""
        return self._native.top(hidden, count)[1]


def _require_room(cache: _native.KeyValueCache, num_tokens: int) -> None:
    if cache.length + num_tokens > cache.capacity:
        raise ValueError(
            f"the cache must hold every position; got capacity={cache.capacity} length={cache.length} "
            f"num_tokens={num_tokens}"
        )


def _require_any(largest: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if not largest:
        raise ValueError(NOT_FINITE)
    return largest


def require_finite(numbers: Floats) -> Floats:
    """The numbers. Raises ValueError where one is NaN or infinity."""
    if not np.isfinite(numbers).all():
        raise ValueError(NOT_FINITE)
    return numbers


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


def _linear_arrays(model: PackedModel, kernel: str, num_threads: int) -> dict[str, np.ndarray]:
    """By tensor name, codes and `weight_scale` of every linear layer as the kernels read them.

    Codes are the model's, or expanded from base 3 for a kernel that does not stream it; scales are copies.
    """
    linears = linear_layers(model.config)
    must_expand = model.encoding == "base3" and not streams_base3(kernel)
    expanded: dict[str, np.ndarray] = {}
    buffers = threading.local()  # one a thread: many of their own would leave the heap with holes
    if must_expand:
        arrays = empty_lines([packed_shape(linear.n, linear.k) for linear in linears.values()])
        expanded = dict(zip(linears, arrays, strict=True))
        largest = max(model.tensors[f"{name}.{CODES[model.encoding]}"].nbytes for name in linears)

    def arrays_of(name: str, linear: LinearLayer) -> dict[str, np.ndarray]:
        tensor = f"{name}.{CODES[model.encoding]}"
        scale = model.read(f"{name}.weight_scale")
        num_blocks = scale.shape[1] if scale.ndim == 2 else 1
        codes = model.tensors[tensor]
        if must_expand:
            if not hasattr(buffers, "buffer"):
                buffers.buffer = bytearray(largest)
            codes = model.read(tensor, buffers.buffer)
        if not is_sound(codes, linear.n, linear.k, num_blocks):
            raise ValueError(
                f"path={model.path} is corrupted: tensor={tensor} holds codes that are no ternary weights; pack it "
                "again"
            )
        if must_expand:
            tensor = f"{name}.w_packed"
            codes = expand_base3(codes, linear.n, linear.k, num_blocks, w_packed=expanded[name])
        return {tensor: codes, f"{name}.weight_scale": panel_scales(scale, linear.n)}

    with ThreadPoolExecutor(min(num_threads, HASH_THREADS)) as pool:
        found = list(pool.map(arrays_of, linears, linears.values()))
    return {name: array for arrays in found for name, array in arrays.items()}


def _native_config(config: EngineConfig) -> dict[str, Any]:
    fields = config.to_dict()
    fields["final_logit_softcapping"] = config.final_logit_softcapping or 0.0
    fields["frequencies"] = [inverse_frequencies(rope, config.head_dim).tolist() for rope in config.rope.values()]
    return fields


def _native_layers(config: EngineConfig, tensors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    kinds = list(config.rope)
    layers: list[dict[str, Any]] = [
        {
            "linears": {},
            "norms": {},
            "window": (config.sliding_window or 0) if layer_type == SLIDING else 0,
            "rope": kinds.index(layer_type),
        }
        for layer_type in config.layer_types
    ]
    for name, linear in linear_layers(config).items():
        layers[int(name.split(".")[2])]["linears"][name.rpartition(".")[2]] = _native_linear(name, linear, tensors)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and name.endswith("norm.weight") and "_proj." not in name:
            layers[int(name.split(".")[2])]["norms"][name.split(".")[-2]] = tensor
    return layers


def _native_linear(name: str, linear: LinearLayer, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "codes": tensors[f"{name}.w_packed" if f"{name}.w_packed" in tensors else f"{name}.w_base3"],
        "weight_scale": tensors[f"{name}.weight_scale"],
        "bias": tensors.get(f"{name}.bias"),
        "input_norm": tensors.get(f"{name}.input_norm.weight"),
        "n": linear.n,
        "k": linear.k,
    }


def _rows(model: PackedModel, name: str) -> dict[str, Any]:
    return {
        "scan": model.tensors[f"{name}.scan"],
        "next": model.tensors[f"{name}.next"],
        "row_scale": model.tensors[f"{name}.row_scale"],
        "column_scale": model.read(f"{name}.column_scale"),
        "mean": model.read(f"{name}.mean"),
        "row_norm": model.tensors[f"{name}.row_norm"],
        "scan_error": model.tensors[f"{name}.scan_error"],
        "next_error": model.tensors[f"{name}.next_error"],
        "file": model.file.fileno(),
        "scan_offset": model.offsets[f"{name}.scan"],
        "next_offset": model.offsets[f"{name}.next"],
        "rest_offset": model.offsets[f"{name}.rest"],
        "scale_offset": model.offsets[f"{name}.row_scale"],
        "vocab_size": model.config.vocab_size,
        "size": model.config.hidden_size,
    }
