"""What the engine must know about an architecture, as flat fields, read from a Hugging Face config.json.

`engine_config` normalises every spelling of transformers 4 and 5 into `EngineConfig`, which is stored in the packed
file; `linear_layers` and `norm_layers` derive the tensors such a file must hold. No arithmetic on tensors here.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from bitdistill_core.choices import ModelType, Subln

SUPPORTED_MODEL_TYPES = get_args(ModelType)
SUBLN_PLACEMENTS = get_args(Subln)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
FULL, SLIDING = "full_attention", "sliding_attention"

# Keys of each supported kind of rotary embedding, besides rope_type and rope_theta.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


MAX_THREADS = 1024
MAX_HIDDEN_SIZE = 1 << 16  # the sums of the output head's INT8 rows fit 32 bits


@dataclass(frozen=True)
class EngineConfig:
    """One decoder-only architecture. Every field is written to the packed file and required in it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_activation: str
    rms_norm_eps: float
    norm_weight_offset: float  # Gemma's norms multiply by 1 + weight
    has_qk_norm: bool
    has_feedforward_norms: bool  # Gemma also norms what attention and MLP add to the residual stream
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    tie_word_embeddings: bool
    embedding_multiplier: float
    attention_scale: float  # multiplies query . key
    final_logit_softcapping: float | None
    layer_types: list[str]  # full_attention or sliding_attention, one a layer
    sliding_window: int | None
    rope: dict[str, dict[str, Any]]  # by layer type: rope_type, rope_theta and the keys of ROPE_KEYS
    subln: str
    sub_norm_eps: float
    eos_token_ids: list[int]

    def __post_init__(self) -> None:
        _check_values(dataclasses.asdict(self))
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                "attention needs num_attention_heads divisible by num_key_value_heads and an even head_dim; got "
                f"num_attention_heads={self.num_attention_heads} num_key_value_heads={self.num_key_value_heads} "
                f"head_dim={self.head_dim}"
            )
        if len(self.layer_types) != self.num_hidden_layers or not set(self.layer_types) <= set(self.rope):
            raise ValueError(
                f"layer_types must name one of {', '.join(self.rope)} for each of num_hidden_layers="
                f"{self.num_hidden_layers} layers; got layer_types={self.layer_types}"
            )
        if SLIDING in self.layer_types and not self.sliding_window:
            raise ValueError(f"sliding_attention layers need sliding_window; got sliding_window={self.sliding_window}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "EngineConfig":
        """The config that `to_dict` wrote, strictly: no missing and no unknown key."""
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - config.keys()), sorted(config.keys() - names)
        if missing or unknown:
            raise ValueError(
                f"an engine config holds exactly the fields of EngineConfig; missing={missing} unknown={unknown}; "
                "make it with engine_config()"
            )
        return cls(**config)

    @property
    def head(self) -> str:
        """Name of the output head's rows: the embedding's where the two are tied."""
        return "model.embed_tokens" if self.tie_word_embeddings else "lm_head"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LinearLayer:
    """A ternary linear layer, N out by K in."""

    n: int
    k: int
    has_bias: bool
    has_input_norm: bool


def engine_config(hf_config: dict[str, Any], *, eos_token_ids: list[int] | None = None) -> dict[str, Any]:
    """The engine's config for a student, from the dictionary in its config.json.

    Absent keys take transformers' default for the model type. The entry `bitdistill` holds the surgery: `subln` and
    `sub_norm_eps`.

    Args:
        eos_token_ids: tokens that end a generation; None takes the config's `eos_token_id`.
    Raises:
        ValueError: an architecture, RoPE type or option this engine does not compute.
    """
    model_type: Any = hf_config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"the engine supports model_type {', '.join(SUPPORTED_MODEL_TYPES)}; got model_type={model_type}; "
            "start from a checkpoint of one of these"
        )
    is_gemma = model_type == "gemma3_text"
    _reject_unsupported(hf_config)
    subln, sub_norm_eps = _surgery(hf_config)
    heads, hidden = _required(hf_config, "num_attention_heads"), _required(hf_config, "hidden_size")
    head_dim = hf_config.get("head_dim") or {"qwen3": 128, "gemma3_text": 256}.get(model_type, hidden // heads)
    layer_types, sliding_window = _layer_types(hf_config)
    attention_bias = model_type in ("qwen3", "llama", "gemma3_text") and bool(hf_config.get("attention_bias"))
    activation = hf_config.get("hidden_activation" if is_gemma else "hidden_act")
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"the engine supports activations {', '.join(ACTIVATIONS)}; got hidden_act={activation}")
    config = EngineConfig(
        model_type=model_type,
        vocab_size=_required(hf_config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_required(hf_config, "intermediate_size"),
        num_hidden_layers=_required(hf_config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=hf_config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=_required(hf_config, "max_position_embeddings"),
        hidden_activation=activation or ("gelu_pytorch_tanh" if is_gemma else "silu"),
        rms_norm_eps=float(hf_config.get("rms_norm_eps", 1e-6)),
        norm_weight_offset=1.0 if is_gemma else 0.0,
        has_qk_norm=model_type in ("qwen3", "gemma3_text"),
        has_feedforward_norms=is_gemma,
        has_qkv_bias=attention_bias or model_type == "qwen2",
        has_o_bias=attention_bias,
        has_mlp_bias=model_type == "llama" and bool(hf_config.get("mlp_bias")),
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", is_gemma)),
        # transformers rounds it to the dtype of the embedding, and a student's embedding is fp32.
        embedding_multiplier=float(np.float32(math.sqrt(hidden))) if is_gemma else 1.0,
        attention_scale=(hf_config.get("query_pre_attn_scalar", 256) if is_gemma else head_dim) ** -0.5,
        final_logit_softcapping=hf_config.get("final_logit_softcapping") if is_gemma else None,
        layer_types=layer_types,
        sliding_window=sliding_window,
        rope=_rope(hf_config),
        subln=subln,
        sub_norm_eps=sub_norm_eps,
        eos_token_ids=_token_ids(hf_config.get("eos_token_id")) if eos_token_ids is None else list(eos_token_ids),
    )
    return config.to_dict()


def linear_layers(config: EngineConfig) -> dict[str, LinearLayer]:
    """Name to shape of every ternary linear layer, in the order of the forward pass."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (queries, hidden, config.has_qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.has_qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.has_qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.has_o_bias),
        "mlp.gate_proj": (inner, hidden, config.has_mlp_bias),
        "mlp.up_proj": (inner, hidden, config.has_mlp_bias),
        "mlp.down_proj": (hidden, inner, config.has_mlp_bias),
    }
    normed = {"none": (), "output": ("self_attn.o_proj", "mlp.down_proj"), "all": tuple(shapes)}[config.subln]
    return {
        f"model.layers.{layer}.{name}": LinearLayer(n, k, has_bias, name in normed)
        for layer in range(config.num_hidden_layers)
        for name, (n, k, has_bias) in shapes.items()
    }


def norm_layers(config: EngineConfig) -> dict[str, int]:
    """Name to width of every norm outside the linear layers."""
    sizes = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if config.has_feedforward_norms:
        sizes |= {"pre_feedforward_layernorm": config.hidden_size, "post_feedforward_layernorm": config.hidden_size}
    if config.has_qk_norm:
        sizes |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    norms = {f"model.layers.{i}.{name}": size for i in range(config.num_hidden_layers) for name, size in sizes.items()}
    return norms | {"model.norm": config.hidden_size}


def _check_values(fields: dict[str, Any]) -> None:
    """Every field of a config, which may come from a file that anybody wrote."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**31

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and -1e30 < value < 1e30

    def is_rope(value: Any) -> bool:
        if not isinstance(value, dict) or not isinstance(value.get("rope_type"), str):
            return False
        keys = ROPE_KEYS.get(value["rope_type"])
        return keys is not None and all(is_number(value.get(key)) and value[key] > 0 for key in ("rope_theta", *keys))

    choices = {"hidden_activation": ACTIVATIONS, "subln": SUBLN_PLACEMENTS, "model_type": SUPPORTED_MODEL_TYPES}
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "layer_types": (
            "a list of layer types",
            lambda v: isinstance(v, list) and all(t in (FULL, SLIDING) for t in v),
        ),
        "rope": (
            f"for each layer type a rope_type of {', '.join(ROPE_KEYS)} and its keys above 0",
            lambda v: isinstance(v, dict) and all(map(is_rope, v.values())),
        ),
        "eos_token_ids": ("a list of token ids", lambda v: isinstance(v, list) and all(type(i) is int for i in v)),
        "hidden_size": (
            f"an integer from 1 to {MAX_HIDDEN_SIZE}",
            lambda v: type(v) is int and 0 < v <= MAX_HIDDEN_SIZE,
        ),
        "sliding_window": ("null or a positive integer", lambda v: v is None or is_count(v)),
        "final_logit_softcapping": ("null or a number above 0", lambda v: v is None or (is_number(v) and v > 0)),
    }
    for field in dataclasses.fields(EngineConfig):
        name, value = field.name, fields[field.name]
        if name in choices:
            rule, is_right = f"one of {', '.join(choices[name])}", value in choices[name]
        elif name in checks:
            rule, is_right = checks[name][0], checks[name][1](value)
        elif field.type is int:
            rule, is_right = "a positive integer below 2^31", is_count(value)
        elif field.type is float:
            rule, is_right = "a finite number", is_number(value) and (value >= 0 or not name.endswith("eps"))
        else:
            rule, is_right = "true or false", type(value) is bool
        if not is_right:
            raise ValueError(f"the engine's config needs {name} as {rule}; got {name}={value!r}")


def _required(hf_config: dict[str, Any], key: str) -> int:
    if not isinstance(hf_config.get(key), int) or hf_config[key] <= 0:
        raise ValueError(f"config.json needs {key} as a positive integer; got {key}={hf_config.get(key)}")
    return hf_config[key]


def _surgery(hf_config: dict[str, Any]) -> tuple[str, float]:
    surgery = hf_config.get("bitdistill") or {}
    if surgery.get("subln") not in SUBLN_PLACEMENTS or "sub_norm_eps" not in surgery:
        raise ValueError(
            f"a student's config.json needs bitdistill.subln, one of {', '.join(SUBLN_PLACEMENTS)}, and "
            f"bitdistill.sub_norm_eps; got bitdistill={hf_config.get('bitdistill')}; pack a checkpoint made by surgery"
        )
    return surgery["subln"], float(surgery["sub_norm_eps"])


def _reject_unsupported(hf_config: dict[str, Any]) -> None:
    if hf_config.get("use_bidirectional_attention"):
        raise ValueError("the engine computes causal attention; got use_bidirectional_attention=True")
    if hf_config["model_type"] == "gemma3_text" and hf_config.get("attn_logit_softcapping") is not None:
        # transformers stores this field of Gemma3 and never applies it, so a student was trained without it.
        raise ValueError(
            "transformers does not apply attn_logit_softcapping in Gemma3, and neither does the engine; got "
            f"attn_logit_softcapping={hf_config['attn_logit_softcapping']}; set it to null"
        )


def _layer_types(hf_config: dict[str, Any]) -> tuple[list[str], int | None]:
    """Type of each layer and the window, by the rules of transformers' configuration classes."""
    model_type, num_layers = hf_config["model_type"], _required(hf_config, "num_hidden_layers")
    window = hf_config.get("sliding_window", 4096)
    if model_type == "llama" or (model_type in ("qwen2", "qwen3") and not hf_config.get("use_sliding_window")):
        window = None
    if model_type == "mistral":
        types = [SLIDING if window else FULL] * num_layers
    elif model_type != "llama" and hf_config.get("layer_types") is not None:
        types = list(hf_config["layer_types"])
    elif model_type == "gemma3_text":
        pattern = hf_config.get("sliding_window_pattern", 6)
        types = [SLIDING if (i + 1) % pattern else FULL for i in range(num_layers)]
    else:
        first = hf_config.get("max_window_layers", 28)
        types = [SLIDING if window is not None and i >= first else FULL for i in range(num_layers)]
    return types, window if SLIDING in types else None


def _rope(hf_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parameters = dict(hf_config.get("rope_parameters") or {})
    scaling = dict(hf_config.get("rope_scaling") or {})  # before transformers 5
    if hf_config["model_type"] == "gemma3_text":
        full = {"rope_theta": hf_config.get("rope_theta", 1e6)} | (parameters.get(FULL) or {}) | scaling
        local = {"rope_theta": hf_config.get("rope_local_base_freq", 1e4)} | (parameters.get(SLIDING) or {})
        return {FULL: _rope_of_layer_type(full, hf_config), SLIDING: _rope_of_layer_type(local, hf_config)}
    shared = _rope_of_layer_type({"rope_theta": hf_config.get("rope_theta", 1e4)} | (scaling or parameters), hf_config)
    return {FULL: shared, SLIDING: shared}


def _rope_of_layer_type(parameters: dict[str, Any], hf_config: dict[str, Any]) -> dict[str, Any]:
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_KEYS or any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(
            f"the engine supports rope_type {', '.join(ROPE_KEYS)}, the same for all layers except in Gemma3; got "
            f"rope_parameters={parameters}"
        )
    if parameters.get("partial_rotary_factor", hf_config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"the engine rotates whole heads; got partial_rotary_factor in rope_parameters={parameters}")
    if rope_type == "llama3":
        parameters.setdefault("original_max_position_embeddings", hf_config["max_position_embeddings"])
    missing = [key for key in ROPE_KEYS[rope_type] if not parameters.get(key)]
    if missing:
        raise ValueError(f"rope_type={rope_type} needs {', '.join(missing)}; got rope_parameters={parameters}")
    keys = ("rope_theta", *ROPE_KEYS[rope_type])
    return {"rope_type": rope_type} | {key: float(parameters[key]) for key in keys}


def _token_ids(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
