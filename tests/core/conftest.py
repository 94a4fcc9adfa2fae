"""Tiny random models of every supported architecture."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, tie_word_embeddings=False, sliding_window=None),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
}


def build(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    values = {**CONFIGS[model_type].to_dict(), **changes}
    model = AutoModelForCausalLM.from_config(type(CONFIGS[model_type])(**values), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture in turn."""
    return build(request.param)
