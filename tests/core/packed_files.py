"""Small packed files: what is written into one, and one taken apart and put together again."""

import json
import struct
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from bitdistill_core.engine.config import EngineConfig, engine_config, linear_layers, norm_layers
from bitdistill_core.packing import Int8Rows, TernaryLinear

TINY = {
    "model_type": "qwen3",
    "vocab_size": 7,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 6,
    "bitdistill": {"subln": "output", "sub_norm_eps": 1e-6},
}
# Every input width is a multiple of 16, the smallest block.
WHOLE_LINES = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
# Rows of groups of base 3 and lines beside them, also within blocks of BASE3_BLOCK weights.
BASE3_BLOCK = 112
BASE3_GROUPS = {"hidden_size": 2 * BASE3_BLOCK, "intermediate_size": 3 * BASE3_BLOCK, "head_dim": BASE3_BLOCK}
TOKENIZER = b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1,"c":2},"merges":[]}}'

Header = dict[str, Any]


def student_arguments(
    seed: int = 0, *, granularity: str = "tensor", block_size: int = 16, encoding: str = "2bit", **changes: Any
) -> dict[str, Any]:
    """What the pack stage hands to `write_student`, with random codes."""
    generator = np.random.default_rng(seed)
    config = engine_config(TINY | changes)
    engine = EngineConfig.from_dict(config)
    linears = {
        name: TernaryLinear(
            generator.integers(-1, 2, (layer.n, layer.k)).astype(np.int8),
            generator.uniform(
                0.2, 0.6, {"tensor": (), "row": (layer.n,), "block": (layer.n, layer.k // block_size)}[granularity]
            ).astype(np.float32),
            generator.standard_normal(layer.n).astype(np.float32) if layer.has_bias else None,
            np.ones(layer.k, np.float32) if layer.has_input_norm else None,
        )
        for name, layer in linear_layers(engine).items()
    }
    codes = generator.integers(-127, 128, (engine.vocab_size, engine.hidden_size)).astype(np.int8)
    scale, mean = (generator.random(engine.hidden_size, np.float32) for _ in range(2))
    rows = Int8Rows(codes, np.full(engine.vocab_size, 0.01, np.float32), scale, mean)
    return {
        "config": config,
        "linears": linears,
        "embeddings": {"model.embed_tokens": rows} | ({} if engine.tie_word_embeddings else {"lm_head": rows}),
        "norms": {name: np.ones(size, np.float32) for name, size in norm_layers(engine).items()},
        "tokenizer_json": b"{}",
        "encoding": encoding,
        "created_by": "test 1",
    }


def split(content: bytes) -> tuple[Header, bytearray]:
    """The header of a file, and the bytes of its tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def join(header: Header, data: bytes, shift: int = 0) -> bytes:
    """A file whose tensors begin `shift` bytes behind a multiple of 64."""
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64 + shift)
    return struct.pack("<Q", len(encoded)) + encoded + bytes(data)


def tensor_names(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def reseal(header: Header, data: bytes) -> None:
    """Makes every checksum right again, so that what is behind it is reached."""
    metadata = header["__metadata__"]
    checksums = {}
    for name in tensor_names(header):
        try:
            begin, end = header[name]["data_offsets"]
            checksums[name] = xxh3_128_hexdigest(data[begin:end])
        except (TypeError, ValueError, KeyError):
            continue
    metadata["checksums"] = json.dumps(checksums)
    if isinstance(metadata.get("config"), str):
        metadata["config_xxh3"] = xxh3_128_hexdigest(metadata["config"].encode())
