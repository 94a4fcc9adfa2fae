"""A packed classifier whose answers mean nothing."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bitdistill_core.engine.config import EngineConfig, engine_config, linear_layers, norm_layers
from bitdistill_core.packing import Int8Rows, TernaryLinear, write_student

CLASSIFIER = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bitdistill": {"subln": "output", "sub_norm_eps": 1e-6},
}


def write_classifier(path: Path, task: dict[str, Any]) -> None:
    """A packed classifier with random codes, one token a byte."""
    rng = np.random.default_rng(0)
    config = engine_config(CLASSIFIER, eos_token_ids=[])
    shapes = linear_layers(EngineConfig.from_dict(config))
    norms = norm_layers(EngineConfig.from_dict(config))
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    write_student(
        path,
        config=config,
        linears={
            name: TernaryLinear(
                rng.integers(-1, 2, (layer.n, layer.k), np.int8),
                weight_scale=np.array(0.1, np.float32),
                input_norm=np.ones(layer.k, np.float32) if name.endswith(("o_proj", "down_proj")) else None,
            )
            for name, layer in shapes.items()
        },
        embeddings={
            "model.embed_tokens": Int8Rows(rng.integers(-127, 128, (256, 32), np.int8), np.full(256, 0.01, np.float32))
        },
        norms={name: np.ones(size, np.float32) for name, size in norms.items()},
        tokenizer_json=tokenizer.to_str().encode(),
        encoding="base3",
        created_by="test 1",
        task=task,
    )
