"""The engine's config against transformers' configuration classes, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from bitdistill_core.engine.config import EngineConfig, engine_config
from tests.core.architectures import ARCHITECTURES, COMMON, GEMMA


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_config_reads_a_saved_config_json(tmp_path: Path, name: str) -> None:
    config = AutoConfig.for_model(**(COMMON | ARCHITECTURES[name]))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    surgery = {"bitdistill": {"subln": "all", "sub_norm_eps": 1e-5}}
    from_file = engine_config(saved | surgery)
    assert from_file == engine_config(config.to_dict() | surgery)
    assert from_file == engine_config(COMMON | ARCHITECTURES[name] | surgery)  # absent keys: transformers' defaults
    assert EngineConfig.from_dict(json.loads(json.dumps(from_file))).to_dict() == from_file


def test_engine_config_reads_the_keys_of_transformers_4() -> None:
    surgery = {"bitdistill": {"subln": "none", "sub_norm_eps": 1e-6}}
    old = COMMON | {"model_type": "qwen3", "rope_theta": 1e6, "rope_scaling": None} | surgery
    assert engine_config(old)["rope"]["full_attention"] == {"rope_type": "default", "rope_theta": 1e6}
    assert engine_config(old)["head_dim"] == 128
    scaling = {"type": "linear", "factor": 8.0}
    old = COMMON | GEMMA | {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling} | surgery
    assert engine_config(old)["rope"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert engine_config(old)["embedding_multiplier"] == float(np.float32(math.sqrt(48)))


def test_engine_config_refuses_what_the_engine_does_not_compute() -> None:
    surgery = {"bitdistill": {"subln": "output", "sub_norm_eps": 1e-6}}
    base = COMMON | {"model_type": "llama"} | surgery
    gemma = COMMON | GEMMA | surgery
    refused: list[tuple[dict[str, Any], str]] = [
        (base | {"model_type": "gpt2"}, "supports model_type qwen3, .*gemma3_text; got model_type=gpt2"),
        (base | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "supports rope_type default, linear, ll"),
        (base | {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        (base | {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        (base | {"hidden_act": "relu"}, "supports activations silu, gelu_pytorch_tanh; got hidden_act=relu"),
        (base | {"hidden_size": None}, "needs hidden_size as a positive integer; got hidden_size=None"),
        (base | {"num_key_value_heads": 3}, "num_attention_heads=4 num_key_value_heads=3"),
        (base | {"bitdistill": None}, "needs bitdistill.subln, one of none, output, all"),
        (gemma | {"attn_logit_softcapping": 50.0}, "does not apply attn_logit_softcapping .*=50.0"),
        (gemma | {"use_bidirectional_attention": True}, "computes causal attention"),
    ]
    for config, message in refused:
        with pytest.raises(ValueError, match=message):
            engine_config(config)
    incomplete = engine_config(base) | {"extra": 1}
    del incomplete["vocab_size"]
    with pytest.raises(ValueError, match=r"missing=\['vocab_size'\] unknown=\['extra'\]"):
        EngineConfig.from_dict(incomplete)
