"""Configs of transformers' models, one for each architecture and option that the engine computes."""

from typing import Any

BOS, EOS, VOCAB_SIZE = 256, 257, 260

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 258,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
GEMMA = {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 6}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# A name for each architecture and option: its config beyond COMMON.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_sliding_bias": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True} | SLIDING,
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama_bias_llama3_rope": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama_linear_rope": {"model_type": "llama", "rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_sliding": {"model_type": "mistral", "sliding_window": 6},
    "gemma3": GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_linear_rope_softcap": GEMMA
    | {"sliding_window_pattern": 2, "rope_parameters": GEMMA_ROPE, "final_logit_softcapping": 3.0},
}
