"""Every kind of model that is computed: what `checkpoints.save_checkpoint` is told to make one."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
QWEN2: dict[str, Any] = {"family": "Qwen2"}
QWEN3: dict[str, Any] = {"family": "Qwen3", "head_dim": 12}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7}
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "one kv head": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 10},
    "tied": {"tie_word_embeddings": True},
    "sharded": {"max_shard_size": "10KB"},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "mistral": {"family": "Mistral", "sliding_window": 7},
    "mistral, full attention": {"family": "Mistral", "sliding_window": None},
    "qwen2": QWEN2,
    "qwen2, attention_bias said": QWEN2 | {"attention_bias": True},  # not read by transformers: none of o_proj
    "qwen2, last layer windowed": QWEN2 | WINDOWS | {"max_window_layers": 1},
    "qwen2, window not in use": QWEN2 | WINDOWS | {"use_sliding_window": False, "max_window_layers": 0},
    "qwen3": QWEN3,
    "qwen3, biases, listed windows": QWEN3
    | WINDOWS
    | {"attention_bias": True, "num_hidden_layers": 3, "layer_types": LAYER_TYPES},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn rope": QWEN3 | {"rope_parameters": YARN},
    "yarn rope, all settings": {
        "head_dim": 16,
        "rope_parameters": YARN | {"beta_fast": 4, "beta_slow": 0.5, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4},
    },
}
