"""Models of known shapes with random weights, the same ones for every engine, and their files in a cache.

Body weights are {-s, 0, s}, one third each; the embedding is gaussian and also the output head. Every tensor is drawn
from a seed of its own name, so the packed file, the GGUF files and the PyTorch model hold the same model, except that
only the packed student has SubLN (gain 1). Speed does not depend on the values; no language model is in them.
"""

import ctypes
import hashlib
import importlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bitdistill_core.engine.config import EngineConfig, engine_config, linear_layers, norm_layers
from bitdistill_core.engine.kernels import streams_base3
from bitdistill_core.packing import FORMAT_VERSION, Int8Rows, TernaryLinear, write_student
from bitdistill_core.panels import base3_shape

WEIGHT_SCALE = 2.0**-5  # exact in every format, near the usual 0.02 * sqrt(3 / 2)
EMBEDDING_STD = 0.02
EMBEDDING = "model.embed_tokens"
RECIPE = 1  # part of the cache folder's name: raise it when the weights or the files change
SUPER_BLOCK = 256  # weights in a row that share a block in llama.cpp's TQ1_0, TQ2_0 and Q6_K

QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": QWEN3
    | {
        "head_dim": 64,
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "qwen3-1.7b": QWEN3
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class GgufType:
    """How llama.cpp stores a model: the body's type, and that of the embedding, which is the head."""

    body: str  # LLAMA_FTYPE_MOSTLY_<body>
    head: str  # GGML_TYPE_<head>

    @property
    def needs_super_blocks(self) -> bool:
        """Whether a type here packs 256 weights of a row into a block."""
        return self.body.startswith("TQ") or self.head.endswith("_K")


GGUF_TYPES = {
    "f16": GgufType("F16", "F16"),
    "q8_0": GgufType("Q8_0", "Q8_0"),
    "q4_0": GgufType("Q4_0", "Q6_K"),
    "tq2_0": GgufType("TQ2_0", "Q4_0"),
    "tq2_0_q6_k": GgufType("TQ2_0", "Q6_K"),
    "tq1_0": GgufType("TQ1_0", "Q6_K"),
}


def student_config(name: str) -> EngineConfig:
    """The engine's config of shape `name`, with SubLN before the two output projections."""
    surgery = {"bitdistill": {"subln": "output", "sub_norm_eps": SHAPES[name]["rms_norm_eps"]}}
    return EngineConfig.from_dict(engine_config(SHAPES[name] | surgery, eos_token_ids=[]))


def num_parameters(name: str) -> int:
    """Parameters of the original model: no SubLN, the head counted once."""
    config = student_config(name)
    body = sum(layer.n * layer.k for layer in linear_layers(config).values())
    return body + config.vocab_size * config.hidden_size + sum(norm_layers(config).values())


def w_ternary(name: str, n: int, k: int) -> NDArray[np.int8]:
    """(N, K) codes in {-1, 0, 1} of the linear layer `name`."""
    return _generator(name).integers(-1, 2, (n, k), np.int8)


def embedding(vocab_size: int, hidden_size: int) -> NDArray[np.float32]:
    """(V, D) gaussian rows."""
    rows = _generator(EMBEDDING).standard_normal((vocab_size, hidden_size), np.float32)
    rows *= EMBEDDING_STD
    return rows


def folder(cache_dir: Path, name: str) -> Path:
    """The folder of shape `name` in the cache; another recipe or shape gets another one."""
    recipe = json.dumps([RECIPE, SHAPES[name]], sort_keys=True)
    return cache_dir / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def packed_file(cache_dir: Path, name: str) -> Path:
    """The packed student, written if it is not in the cache."""
    target = folder(cache_dir, name) / f"model-{FORMAT_VERSION}.bitdistill"
    return _cached(target, lambda path: _write_packed(path, name))


def gguf_file(cache_dir: Path, name: str, gguf_type: str, num_threads: int) -> Path:
    """The GGUF file of a type in `GGUF_TYPES`; llama.cpp's own quantiser makes it from the F16 one."""
    target = folder(cache_dir, name) / f"model-{gguf_type}.gguf"
    if gguf_type == "f16":
        return _cached(target, lambda path: _write_f16_gguf(path, name))
    source = gguf_file(cache_dir, name, "f16", num_threads)
    return _cached(target, lambda path: _quantize_gguf(source, path, GGUF_TYPES[gguf_type], num_threads))


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _cached(path: Path, write: Callable[[Path], None]) -> Path:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _tokenizer_json() -> bytes:
    """One token a byte. The benchmark works with token ids; a packed file needs a tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def code_bits(name: str, kernel: str) -> float:
    """Bits of a ternary weight as `kernel` streams the packed student."""
    if not streams_base3(kernel):
        return 2.0
    linears = linear_layers(student_config(name)).values()
    return 8 * sum(math.prod(base3_shape(layer.n, layer.k)) for layer in linears) / sum(x.n * x.k for x in linears)


def _write_packed(path: Path, name: str) -> None:
    config = student_config(name)
    rows = embedding(config.vocab_size, config.hidden_size)
    row_scale = np.abs(rows).max(axis=1) / 127
    rows /= row_scale[:, None]
    write_student(
        path,
        config=config.to_dict(),
        linears={
            linear: TernaryLinear(
                w_ternary(linear, layer.n, layer.k),
                np.array(WEIGHT_SCALE, np.float32),
                input_norm=np.ones(layer.k, np.float32) if layer.has_input_norm else None,
            )
            for linear, layer in linear_layers(config).items()
        },
        embeddings={EMBEDDING: Int8Rows(np.rint(rows, out=rows).astype(np.int8), row_scale)},
        norms={norm: np.ones(size, np.float32) for norm, size in norm_layers(config).items()},
        tokenizer_json=_tokenizer_json(),
        encoding="base3",
        created_by="bitdistill benchmarks",
    )


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(module: str) -> str:
    if module in (EMBEDDING, "model.norm"):
        return "token_embd.weight" if module == EMBEDDING else "output_norm.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def _gguf_tensors(config: EngineConfig) -> Iterator[tuple[str, NDArray[Any]]]:
    yield _gguf_name(EMBEDDING), embedding(config.vocab_size, config.hidden_size).astype(np.float16)
    for linear, layer in linear_layers(config).items():
        weight = w_ternary(linear, layer.n, layer.k) * np.float16(WEIGHT_SCALE)
        if config.model_type == "llama" and linear.endswith(("q_proj", "k_proj")):
            # llama.cpp rotates neighbours (2i, 2i + 1) in this architecture, transformers halves (i, i + head_dim / 2)
            halves = weight.reshape(-1, 2, config.head_dim // 2, layer.k)
            weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(layer.n, layer.k)
        yield _gguf_name(linear), weight
    for norm, size in norm_layers(config).items():
        yield _gguf_name(norm), np.ones(size, np.float32)


def write_hyperparameters(writer: Any, config: Any, rope_theta: float) -> None:
    """Sizes and constants of a model, of the engine's config or of transformers', into a gguf.GGUFWriter."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_f16_gguf(path: Path, name: str) -> None:
    import gguf

    config = student_config(name)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    write_hyperparameters(writer, config, config.rope["full_attention"]["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    for tensor_name, tensor in _gguf_tensors(config):
        writer.add_tensor(tensor_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize_gguf(source: Path, target: Path, gguf_type: GgufType, num_threads: int) -> None:
    llama = llama_library()
    params = llama.llama_model_quantize_default_params()
    params.nthread = num_threads
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{gguf_type.body}")
    params.token_embedding_type = params.output_tensor_type = getattr(llama, f"GGML_TYPE_{gguf_type.head}")
    failed = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failed:
        raise ValueError(f"llama.cpp could not quantise path={source} to {gguf_type}; remove the file and try again")


@cache
def llama_library() -> Any:
    """llama.cpp's C functions, without its log; they say by their results whether they failed."""
    llama = importlib.import_module("llama_cpp")
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    llama.llama_backend_init()
    return llama


def torch_model(name: str, dtype: str) -> Any:
    """The transformers model of shape `name`, with the same weights in `dtype`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = student_config(name)
    hf_config = AutoConfig.for_model(**SHAPES[name])
    model = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        model.get_parameter(f"{EMBEDDING}.weight").copy_(
            torch.from_numpy(embedding(config.vocab_size, config.hidden_size))
        )
        for linear, layer in linear_layers(config).items():
            weight = model.get_parameter(f"{linear}.weight")
            weight.copy_(torch.from_numpy(w_ternary(linear, layer.n, layer.k))).mul_(WEIGHT_SCALE)
    return model
