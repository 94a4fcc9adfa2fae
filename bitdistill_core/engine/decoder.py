"""The decoder of a packed student: token ids in, final hidden states out, with a key-value cache."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.engine.config import EngineConfig, linear_layers
from bitdistill_core.engine.layers import (
    Floats,
    PackedBitLinear,
    activate,
    causal_attention,
    embed,
    inverse_frequencies,
    project_to_vocabulary,
    rms_norm,
    rotate,
    rotation,
    softcap,
)
from bitdistill_core.packing import Int8Rows, PackedModel

Rotation = tuple[Floats, Floats]


class KeyValueCache:
    """Keys and values of every layer, (L, Hkv, capacity, d) fp32, for the first `length` positions."""

    def __init__(self, config: EngineConfig, capacity: int) -> None:
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = np.empty(shape, np.float32)
        self.values = np.empty(shape, np.float32)
        self.length = 0

    def extend(self, layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Stores (T, Hkv, d) after `length` and returns all positions, (Hkv, length + T, d)."""
        end = self.length + len(keys)
        self.keys[layer, :, self.length : end] = keys.transpose(1, 0, 2)
        self.values[layer, :, self.length : end] = values.transpose(1, 0, 2)
        return self.keys[layer, :, :end], self.values[layer, :, :end]


@dataclass(frozen=True)
class DecoderLayer:
    """One block: attention and gated MLP, each added to the residual stream."""

    index: int
    config: EngineConfig
    linears: dict[str, PackedBitLinear]  # by the last part of their name
    norms: dict[str, Floats]

    def __call__(self, x: Floats, cache: KeyValueCache, rotations: dict[str, Rotation]) -> Floats:
        attended = self._attention(self._norm("input_layernorm", x), cache, rotations)
        if not self.config.has_feedforward_norms:
            x = x + attended
            return x + self._mlp(self._norm("post_attention_layernorm", x))
        x = x + self._norm("post_attention_layernorm", attended)
        inner = self._mlp(self._norm("pre_feedforward_layernorm", x))
        return x + self._norm("post_feedforward_layernorm", inner)

    def _attention(self, x: Floats, cache: KeyValueCache, rotations: dict[str, Rotation]) -> Floats:
        config, layer_type = self.config, self.config.layer_types[self.index]
        queries = self.linears["q_proj"](x).reshape(len(x), config.num_attention_heads, config.head_dim)
        keys = self.linears["k_proj"](x).reshape(len(x), config.num_key_value_heads, config.head_dim)
        values = self.linears["v_proj"](x).reshape(len(x), config.num_key_value_heads, config.head_dim)
        if config.has_qk_norm:
            queries, keys = self._norm("q_norm", queries), self._norm("k_norm", keys)
        queries, keys = rotate(queries, *rotations[layer_type]), rotate(keys, *rotations[layer_type])
        all_keys, all_values = cache.extend(self.index, keys, values)
        attended = causal_attention(
            queries,
            all_keys,
            all_values,
            first_position=cache.length,
            scale=config.attention_scale,
            window=config.sliding_window if layer_type == "sliding_attention" else None,
        )
        return self.linears["o_proj"](attended)

    def _mlp(self, x: Floats) -> Floats:
        gate = activate(self.linears["gate_proj"](x), self.config.hidden_activation)
        return self.linears["down_proj"](gate * self.linears["up_proj"](x))

    def _norm(self, name: str, x: Floats) -> Floats:
        return rms_norm(x, self.norms[name], self.config.rms_norm_eps, self.config.norm_weight_offset)


class Decoder:
    """All layers of a packed model. Holds no state between calls: that is the cache."""

    def __init__(self, model: PackedModel, *, kernel: str, num_threads: int) -> None:
        config, tensors = model.config, model.tensors
        self.config = config
        self.embedding = Int8Rows(tensors["model.embed_tokens.w_int8"], tensors["model.embed_tokens.row_scale"])
        self.head = self.embedding
        if not config.tie_word_embeddings:
            self.head = Int8Rows(tensors["lm_head.w_int8"], tensors["lm_head.row_scale"])
        self.final_norm = tensors["model.norm.weight"]
        self.frequencies = {kind: inverse_frequencies(rope, config.head_dim) for kind, rope in config.rope.items()}
        linears: list[dict[str, PackedBitLinear]] = [{} for _ in range(config.num_hidden_layers)]
        for name, layer in linear_layers(config).items():
            linears[int(name.split(".")[2])][name.rpartition(".")[2]] = PackedBitLinear(
                tensors, name, layer.n, sub_norm_eps=config.sub_norm_eps, kernel=kernel, num_threads=num_threads
            )
        norms: list[dict[str, Floats]] = [{} for _ in range(config.num_hidden_layers)]
        for name, tensor in tensors.items():
            if name.startswith("model.layers.") and name.endswith("norm.weight") and "_proj." not in name:
                norms[int(name.split(".")[2])][name.split(".")[-2]] = tensor
        self.layers = [DecoderLayer(i, config, linears[i], norms[i]) for i in range(config.num_hidden_layers)]

    def forward(self, ids: NDArray[np.int64], cache: KeyValueCache) -> Floats:
        """(T, D) final hidden states of `ids`, which follow the positions in `cache`; the cache grows by them."""
        x = embed(self.embedding, ids)
        if self.config.embedding_multiplier != 1.0:
            x *= np.float32(self.config.embedding_multiplier)
        rotations = {kind: rotation(freq, cache.length, len(ids)) for kind, freq in self.frequencies.items()}
        for layer in self.layers:
            x = layer(x, cache, rotations)
        cache.length += len(ids)
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps, self.config.norm_weight_offset)

    def logits(self, hidden: Floats) -> Floats:
        """(T, V) fp32 logits of final hidden states."""
        return softcap(project_to_vocabulary(self.head, hidden), self.config.final_logit_softcapping)
