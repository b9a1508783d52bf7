"""The shape of a model as plain numbers, read from a Hugging Face config.json: sizes, rotary settings, end-of-sequence ids.

Owns what may be accepted: an architecture, a rotary type or a flag that this engine does not compute is refused here, before
a GPU is touched. Also owns how the sizes divide over tensor-parallel ranks, so that the planner's arithmetic and the layers
agree. No torch: the control plane reads shapes too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.config import ConfigError, ModelConfig

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ROPE_TYPES = ("default", "llama3")

# What transformers' MistralConfig means when the key is absent.
MISTRAL_SLIDING_WINDOW = 4096
MISTRAL_MAX_POSITIONS = 131_072
LLAMA_MAX_POSITIONS = 2048


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary frequencies of Llama 3.1 and later: long wavelengths are stretched by `factor`, with a smooth transition."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LocalSizes:
    """What one of `tensor_parallel` ranks holds. `vocab_size` is padded up, so that every rank has the same number of rows."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class ModelShape:
    """One decoder-only transformer with RMSNorm, rotary positions and a SiLU-gated MLP, none of them with biases."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    max_position_embeddings: int = LLAMA_MAX_POSITIONS
    sliding_window: int | None = None  # a token sees the keys at positions > its own - sliding_window
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str | None = None  # of the checkpoint

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "model.architecture") -> ModelShape:
        """Reads the fields of a Hugging Face config.json. `source` is how error sentences call it. Raises ConfigError."""
        return _from_hf(_Fields(config, source))

    def num_parameters(self, tensor_parallel: int = 1) -> int:
        """Parameters of the model, or of one of its ranks."""
        local = self.local_sizes(tensor_parallel)
        attention = 2 * self.hidden_size * (local.num_heads + local.num_kv_heads) * self.head_dim
        mlp = 3 * self.hidden_size * local.intermediate_size
        embeddings = local.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size

    def weight_bytes(self, dtype: str, tensor_parallel: int = 1) -> int:
        """Bytes of the parameters that one rank holds."""
        return self.num_parameters(tensor_parallel) * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str, tensor_parallel: int = 1) -> int:
        """Bytes of keys and values of one token over all layers, on one rank."""
        return 2 * self.num_layers * self.local_sizes(tensor_parallel).num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def local_sizes(self, tensor_parallel: int) -> LocalSizes:
        """How the sizes divide over ranks; ConfigError where they do not.

        KV heads are replicated when there are more ranks than KV heads: then rank r holds head r * num_kv_heads // ranks.
        """
        for size, what in ((self.num_heads, "attention heads"), (self.intermediate_size, "MLP columns (intermediate_size)")):
            if size % tensor_parallel:
                raise ConfigError(_indivisible(tensor_parallel, size, what))
        if self.num_kv_heads % tensor_parallel and tensor_parallel % self.num_kv_heads:
            raise ConfigError(_indivisible(tensor_parallel, self.num_kv_heads, "key-value heads, nor is it a multiple of them"))
        return LocalSizes(
            num_heads=self.num_heads // tensor_parallel,
            num_kv_heads=max(1, self.num_kv_heads // tensor_parallel),
            intermediate_size=self.intermediate_size // tensor_parallel,
            vocab_size=-(-self.vocab_size // tensor_parallel),
        )


def load_shape(model: ModelConfig) -> ModelShape:
    """The shape that `model.path`/config.json states, else `model.architecture`. Raises ConfigError."""
    if model.path is None:
        if not model.architecture:
            raise ConfigError("model.path is null and model.architecture is empty: give a checkpoint, or fields of a config.json")
        return ModelShape.from_hf(model.architecture)
    folder = Path(model.path)
    config = _read_json(folder / "config.json")
    if config is None:
        raise ConfigError(f"model.path={model.path} has no config.json: it must be a checkpoint folder in Hugging Face form")
    generation = _read_json(folder / "generation_config.json") or {}
    if generation.get("eos_token_id") is not None:
        config = {**config, "eos_token_id": generation["eos_token_id"]}
    return ModelShape.from_hf(config, source=str(folder / "config.json"))


def resolve_dtype(requested: str, shape: ModelShape, on_gpu: bool) -> str:
    """What `model.dtype` means: `auto` is the checkpoint's own type (bfloat16 if it states none), float32 on a CPU."""
    if requested != "auto":
        return requested
    return (shape.dtype or "bfloat16") if on_gpu else "float32"


def _indivisible(tensor_parallel: int, size: int, what: str) -> str:
    return f"hw.tensor_parallel={tensor_parallel} does not divide the model's {size:,} {what}"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


class _Fields:
    """Typed access to the fields of a config.json, with errors that name the field."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def error(self, name: str, valid: str) -> ConfigError:
        return ConfigError(f"{self.source}: {name}={self.values.get(name)!r} must be {valid}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, "a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool | None):
            raise self.error(name, "true or false")
        return bool(value)

    def nested(self, name: str) -> _Fields:
        value = self.values.get(name)
        if not isinstance(value, Mapping | None):
            raise self.error(name, "an object or null")
        return _Fields(value or {}, f"{self.source}: {name}")


def _from_hf(hf: _Fields) -> ModelShape:
    architecture = _architecture(hf)
    mistral = ARCHITECTURES[architecture] == "mistral"
    _refuse_what_is_not_computed(hf)
    hidden_size, num_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    num_kv_heads = hf.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise hf.error("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    rope_theta, rope_scaling = _rope(hf)
    return ModelShape(
        architecture=architecture,
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf.integer("intermediate_size"),
        num_layers=hf.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(hf, hidden_size, num_heads),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=hf.integer("max_position_embeddings", MISTRAL_MAX_POSITIONS if mistral else LLAMA_MAX_POSITIONS),
        sliding_window=_sliding_window(hf) if mistral else None,
        tie_word_embeddings=hf.flag("tie_word_embeddings"),
        eos_token_ids=_token_ids(hf, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(hf, "bos_token_id")), None),
        dtype=_dtype(hf),
    )


def _architecture(hf: _Fields) -> str:
    """From `architectures`, else from `model_type`."""
    listed = hf.values.get("architectures") or []
    known = {name: name for name in ARCHITECTURES} | {model_type: name for name, model_type in ARCHITECTURES.items()}
    name = listed[0] if listed else hf.values.get("model_type")
    if name not in known:
        raise hf.error("architectures" if listed else "model_type", f"one of {', '.join(known)}")
    return known[name]


def _refuse_what_is_not_computed(hf: _Fields) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if hf.flag(name):
            raise hf.error(name, "false: linear layers with biases are not supported")
    if hf.values.get("quantization_config") is not None:
        raise hf.error("quantization_config", "null: quantised checkpoints are not supported")
    if hf.values.get("hidden_act", "silu") != "silu":
        raise hf.error("hidden_act", "silu")


def _head_dim(hf: _Fields, hidden_size: int, num_heads: int) -> int:
    if hf.values.get("head_dim") is None and hidden_size % num_heads:
        raise hf.error("hidden_size", f"a multiple of num_attention_heads={num_heads} where head_dim is not given")
    head_dim = hf.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise hf.error("head_dim", "even: rotary embedding turns pairs of elements")
    return head_dim


def _rope(hf: _Fields) -> tuple[float, Llama3Rope | None]:
    """Reads both spellings: rope_theta + rope_scaling, and rope_parameters, which holds the two together."""
    name = "rope_parameters" if hf.values.get("rope_parameters") is not None else "rope_scaling"
    rope = hf.nested(name)
    theta = rope.number("rope_theta", hf.number("rope_theta", 10_000.0))
    partial = rope.values.get("partial_rotary_factor", hf.values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(f"{hf.source}: partial_rotary_factor={partial!r} must be 1 or absent")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{rope.source}: rope_type={kind!r} must be one of {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    return theta, Llama3Rope(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )


def _sliding_window(hf: _Fields) -> int | None:
    """Null means full attention; an absent key means what transformers' MistralConfig takes it for."""
    if "sliding_window" in hf.values and hf.values["sliding_window"] is None:
        return None
    return hf.integer("sliding_window", MISTRAL_SLIDING_WINDOW)


def _token_ids(hf: _Fields, name: str) -> tuple[int, ...]:
    value = hf.values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise hf.error(name, "a token id, a list of them, or null")
    return tuple(ids)


def _dtype(hf: _Fields) -> str | None:
    name = "dtype" if hf.values.get("dtype") is not None else "torch_dtype"
    value = hf.values.get(name)
    if value is not None and value not in DTYPE_BYTES:
        raise hf.error(name, f"one of {', '.join(DTYPE_BYTES)}, or absent")
    return value
