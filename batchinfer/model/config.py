"""The shape of a model as plain numbers, read from a Hugging Face config.json: sizes, biases, windows, end-of-sequence ids.

Owns what may be accepted: an architecture or a flag that this engine does not compute is refused here, before a GPU is
touched (rotary settings: `rope_config`). Also owns how the sizes divide over tensor-parallel ranks, so that the planner's
arithmetic and the layers agree. No torch: the control plane reads shapes too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchinfer.config import ConfigError, ModelConfig
from batchinfer.model.fields import Fields
from batchinfer.model.rope_config import DynamicRope, LinearRope, RopeScaling, YarnRope, read_rope

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Architecture:
    """What transformers' class of this name computes that its config.json need not say."""

    model_type: str
    defaults: Mapping[str, Any]  # of its configuration class, for keys that are absent
    bias_flags: tuple[str, ...] = ()  # those of attention_bias and mlp_bias that it reads
    qkv_bias: bool = False  # biases of queries, keys and values (and of nothing else), whatever attention_bias says
    qk_norm: bool = False
    window_flag: bool = False  # sliding_window counts only where use_sliding_window is true, and not for every layer


_BOS_EOS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        "llama", {"max_position_embeddings": 2048, **_BOS_EOS}, bias_flags=("attention_bias", "mlp_bias")
    ),
    "MistralForCausalLM": Architecture(
        "mistral", {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096, **_BOS_EOS}
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", _QWEN, bias_flags=("attention_bias",), qkv_bias=True, window_flag=True),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", {**_QWEN, "head_dim": 128}, bias_flags=("attention_bias",), qk_norm=True, window_flag=True
    ),
}
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layer types


@dataclass(frozen=True)
class LocalSizes:
    """What one of `tensor_parallel` ranks holds. `vocab_size` is padded up, so that every rank has the same number of rows."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class ModelShape:
    """One decoder-only transformer with RMSNorm, rotary positions and a SiLU-gated MLP."""

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
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None  # a token sees the keys at positions > its own - sliding_window
    full_attention_layers: frozenset[int] = field(default_factory=frozenset)  # to which the window does not apply
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of queries and keys, before their rotation
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str | None = None  # of the checkpoint

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "model.architecture") -> ModelShape:
        """Reads the fields of a Hugging Face config.json. `source` is how error sentences call it. Raises ConfigError."""
        return _from_hf(config, source)

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence that has positions: max_position_embeddings, or what rope scaling reaches beyond it."""
        match self.rope_scaling:
            case YarnRope(factor=factor, original_max_position_embeddings=original):
                return max(self.max_position_embeddings, int(factor * original))
            case LinearRope(factor=factor) | DynamicRope(factor=factor):
                return max(self.max_position_embeddings, int(factor * self.max_position_embeddings))
            case _:
                return self.max_position_embeddings

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer; None is full attention."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def num_parameters(self, tensor_parallel: int = 1) -> int:
        """Parameters of the model, or of one of its ranks. Norms and the biases of row-parallel layers are on every rank."""
        local = self.local_sizes(tensor_parallel)
        q, kv = local.num_heads * self.head_dim, local.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (q + kv)
        attention += (q + 2 * kv) * self.qkv_bias + self.hidden_size * self.o_bias + 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden_size * local.intermediate_size
        mlp += (2 * local.intermediate_size + self.hidden_size) * self.mlp_bias
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


def _from_hf(config: Mapping[str, Any], source: str) -> ModelShape:
    name = _architecture(Fields(config, source))
    architecture = ARCHITECTURES[name]
    hf = Fields({**architecture.defaults, **config}, source)
    _refuse_what_is_not_computed(hf, name)
    hidden_size, num_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    num_kv_heads = hf.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise hf.error("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    num_layers, head_dim = hf.integer("num_hidden_layers"), _head_dim(hf, hidden_size, num_heads)
    max_position_embeddings = hf.integer("max_position_embeddings")
    rope_theta, rope_scaling = read_rope(hf, head_dim, max_position_embeddings)
    sliding_window, full_attention_layers = _windows(hf, name, num_layers)
    return ModelShape(
        architecture=name,
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_position_embeddings,
        sliding_window=sliding_window,
        full_attention_layers=full_attention_layers,
        qkv_bias=architecture.qkv_bias or hf.flag("attention_bias"),
        o_bias=hf.flag("attention_bias") and not architecture.qkv_bias,
        mlp_bias=hf.flag("mlp_bias"),
        qk_norm=architecture.qk_norm,
        tie_word_embeddings=hf.flag("tie_word_embeddings"),
        eos_token_ids=hf.token_ids("eos_token_id"),
        bos_token_id=next(iter(hf.token_ids("bos_token_id")), None),
        dtype=_dtype(hf),
    )


def _architecture(hf: Fields) -> str:
    """From `architectures`, else from `model_type`."""
    listed = hf.values.get("architectures") or []
    known = {name: name for name in ARCHITECTURES} | {a.model_type: name for name, a in ARCHITECTURES.items()}
    name = listed[0] if listed else hf.values.get("model_type")
    if name not in known:
        raise hf.error("architectures" if listed else "model_type", f"one of {', '.join(known)}")
    return known[name]


def _refuse_what_is_not_computed(hf: Fields, architecture: str) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if hf.flag(name) and name not in ARCHITECTURES[architecture].bias_flags:
            raise hf.error(name, f"false or absent: {architecture} has no such biases")
    if hf.has("quantization_config"):
        raise hf.error("quantization_config", "null: quantised checkpoints are not supported")
    if hf.has("per_layer_config"):
        raise hf.error("per_layer_config", "null: layers of different shapes are not supported")
    if not hf.flag("is_causal", default=True):
        raise hf.error("is_causal", "true or absent: tokens see only what is before them")
    if hf.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise hf.error("hidden_act", "silu")


def _head_dim(hf: Fields, hidden_size: int, num_heads: int) -> int:
    if not hf.has("head_dim") and hidden_size % num_heads:
        raise hf.error("hidden_size", f"a multiple of num_attention_heads={num_heads} where head_dim is not given")
    head_dim = hf.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise hf.error("head_dim", "even: rotary embedding turns pairs of elements")
    return head_dim


def _windows(hf: Fields, architecture: str, num_layers: int) -> tuple[int | None, frozenset[int]]:
    """The sliding window, and the layers that attend to everything all the same."""
    window = _window(hf, ARCHITECTURES[architecture])
    types = _layer_types(hf, architecture, window, num_layers)
    if SLIDING not in types:
        return None, frozenset()
    return window, frozenset(i for i, kind in enumerate(types) if kind == FULL)


def _window(hf: Fields, architecture: Architecture) -> int | None:
    """Null is none; so is a window that the architecture does not look at, or only where use_sliding_window is true."""
    ignored = "sliding_window" not in architecture.defaults or (architecture.window_flag and not hf.flag("use_sliding_window"))
    return hf.integer("sliding_window") if hf.has("sliding_window") and not ignored else None


def _layer_types(hf: Fields, architecture: str, window: int | None, num_layers: int) -> list[str]:
    """Of each layer; where they are not listed, Qwen windows those from max_window_layers on, Mistral all."""
    chosen = ARCHITECTURES[architecture].window_flag
    first = num_layers if window is None else hf.integer("max_window_layers", least=0) if chosen else 0
    implied = [SLIDING if i >= first else FULL for i in range(num_layers)]
    if not hf.has("layer_types"):
        return implied
    types = hf.values["layer_types"]
    if not chosen and types != implied:
        raise hf.error("layer_types", f"absent: {architecture} has the same attention in every layer")
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise hf.error("layer_types", f"a list of num_hidden_layers={num_layers} times {FULL} or {SLIDING}")
    if SLIDING in types and window is None:
        raise hf.error("layer_types", f"without {SLIDING} where no sliding_window is in use")
    return types


def _dtype(hf: Fields) -> str | None:
    name = "dtype" if hf.has("dtype") else "torch_dtype"
    value = hf.values.get(name)
    if value is not None and value not in DTYPE_BYTES:
        raise hf.error(name, f"one of {', '.join(DTYPE_BYTES)}, or absent")
    return value
