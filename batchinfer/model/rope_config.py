"""Settings of rotary positions as plain numbers, read from a config.json in both spellings. No torch.

`rope.rotary_table` computes with them. A type or a setting that changes the arithmetic and is not computed is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchinfer.config import ConfigError
from batchinfer.model.fields import Fields


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """The base grows with the length once it exceeds `max_position_embeddings`, the length of training."""

    factor: float
    max_position_embeddings: int


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary frequencies of Llama 3.1 and later: long wavelengths are stretched by `factor`, with a smooth transition."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnRope:
    """Elements that turn fewer than `beta_slow` times in the original context are stretched, beyond `beta_fast` they are not.

    `truncate`: the borders between the two are rounded outwards to whole elements. Cosines and sines are multiplied with
    `attention_factor`, so that scores grow by its square.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope

# The settings that each type has. transformers ignores others, which would hide what a checkpoint's author meant.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
}
EVERY_TYPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned")


def read_rope(hf: Fields, head_dim: int, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """The base of the frequencies and how they are scaled: from rope_theta + rope_scaling, or from rope_parameters.

    Raises ConfigError. Where both spellings are given they must agree: transformers would drop one of them.
    """
    rope = hf.nested("rope_parameters" if hf.has("rope_parameters") else "rope_scaling")
    if hf.has("rope_parameters") and hf.has("rope_scaling") and hf.values["rope_parameters"] != hf.values["rope_scaling"]:
        raise ConfigError(f"{hf.source}: rope_parameters and rope_scaling differ: give one of them")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{rope.source}: rope_type={kind!r} must be one of {', '.join(ROPE_TYPES)}")
    _refuse_what_is_not_computed(hf, rope, kind)
    theta = rope.number("rope_theta", hf.number("rope_theta", 10_000.0))
    if theta <= 1:
        raise (rope if rope.has("rope_theta") else hf).error("rope_theta", "above 1")
    return theta, _scaling(hf, rope, kind, head_dim, max_position_embeddings)


def _refuse_what_is_not_computed(hf: Fields, rope: Fields, kind: str) -> None:
    partial = rope.values.get("partial_rotary_factor", hf.values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(f"{hf.source}: partial_rotary_factor={partial!r} must be 1 or absent")
    known = (*EVERY_TYPE, *ROPE_TYPES[kind])
    for name in rope.values:
        if rope.has(name) and name not in known:
            raise rope.error(name, f"absent: rope_type={kind!r} has {', '.join(ROPE_TYPES[kind]) or 'no settings'}")


def _scaling(hf: Fields, rope: Fields, kind: str, head_dim: int, max_position_embeddings: int) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = rope.number("factor")
    if kind == "linear":
        return LinearRope(factor)
    if kind == "dynamic":
        if head_dim < 4:
            raise ConfigError(f"{rope.source}: rope_type='dynamic' needs a head_dim of at least 4, and it is {head_dim}")
        return DynamicRope(factor, max_position_embeddings)
    # transformers prefers the one beside the object, and takes the model's length where neither is given.
    inside = rope.integer("original_max_position_embeddings", max_position_embeddings)
    original = hf.integer("original_max_position_embeddings", inside)
    if kind == "llama3":
        return _llama3(rope, factor, original)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", _attention_factor(rope, factor)),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", default=True),
    )


def _llama3(rope: Fields, factor: float, original: int) -> Llama3Rope:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"above low_freq_factor={low}")
    return Llama3Rope(factor, low, high, original)


def _attention_factor(rope: Fields, factor: float) -> float:
    """YaRN's temperature of attention for a stretch by `factor` (Peng et al. 2023, section 3.4), or DeepSeek's ratio of two."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0

    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return of(rope.number("mscale")) / of(rope.number("mscale_all_dim"))
    return of(1.0)
