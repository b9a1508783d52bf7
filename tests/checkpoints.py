"""Small random checkpoints, made by transformers itself, with every parameter random: an all-ones norm hides mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(seed: int = 0, family: str = "Llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A transformers model: Llama (or Mistral, Qwen2, Qwen3) with the fields of LLAMA, changed by `changes`."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**LLAMA, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def save_checkpoint(folder: Path, max_shard_size: str = "5GB", **changes: Any) -> Any:
    """`random_model(**changes)`, saved in `folder`; returns the model."""
    model = random_model(**changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
