"""Sampling of single rows: what `input.sampling_column` overrides, held to the same rules as the sampling group itself."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from batchinfer.config import GRAMMARS, ConfigError, SamplingConfig, build_group, check_sampling
from batchinfer.engine.sequence import SamplingParams

_INTEGERS = {name for name, hint in typing.get_type_hints(SamplingConfig).items() if int in (hint, *typing.get_args(hint))}
_PARAMS = {field.name for field in dataclasses.fields(SamplingParams)}


class BadSampling(ValueError):
    """A row's overrides are not valid: one sentence."""


def row_sampling(base: SamplingConfig, override: object) -> SamplingConfig:
    """`base` with a row's overrides: a mapping, JSON text of one, or None. Null fields override nothing. Raises BadSampling.

    A row's grammar takes the place of the base's, of whichever kind.
    """
    is_struct = isinstance(override, Mapping)
    if isinstance(override, str):
        try:
            override = json.loads(override)
        except (ValueError, RecursionError) as error:
            raise BadSampling(f"sampling overrides are not JSON: {error}") from error
    if override is None:
        return base
    if not isinstance(override, Mapping):
        raise BadSampling(f"sampling overrides must be an object of sampling keys, not {type(override).__name__}")
    given = {key: _whole(key, value) for key, value in override.items() if value is not None}
    if not given:
        return base
    if is_struct and "json_schema" in given:
        given["json_schema"] = _without_nulls(given["json_schema"])
    replaced = dict.fromkeys(GRAMMARS) if not given.keys().isdisjoint(GRAMMARS) else {}
    sampling = _checked(base, replaced | given)
    _require_columns(base, sampling)
    return sampling


def _without_nulls(value: object) -> object:
    """A nested value of an Arrow struct, where every row has the names of all rows, and null stands for those it lacks."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _whole(key: str, value: object) -> object:
    """Integers come as floats out of data frames with gaps: 64.0 is 64."""
    return int(value) if key in _INTEGERS and isinstance(value, float) and value.is_integer() else value


def _checked(base: SamplingConfig, changed: dict[str, Any]) -> SamplingConfig:
    try:
        new: SamplingConfig = build_group(SamplingConfig, changed, "sampling.")
        sampling = dataclasses.replace(base, **{name: getattr(new, name) for name in changed})
        check_sampling(sampling)
    except (ConfigError, OverflowError) as error:  # JSON integers have no limit, floats have
        raise BadSampling(str(error)) from error
    return sampling


def _require_columns(base: SamplingConfig, sampling: SamplingConfig) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(base, name) is None and getattr(sampling, name) is not None:
            raise BadSampling(
                f"sampling.{name}={getattr(sampling, name)}: the run has no column for it; set it for the whole run"
            )


def to_params(sampling: SamplingConfig, max_tokens: int, vocab_size: int) -> SamplingParams:
    """What the engine is asked: at most `max_tokens` tokens, and numbers no larger than they can matter."""
    values = {name: getattr(sampling, name) for name in _PARAMS}  # dataclasses.asdict would copy deeply, for every row
    limit = min(sampling.max_tokens, max_tokens)
    cut = {"max_tokens": limit, "min_tokens": min(sampling.min_tokens, limit), "top_k": min(sampling.top_k, vocab_size)}
    for name in ("logprobs", "prompt_logprobs"):
        if values[name] is not None:
            cut[name] = min(values[name], vocab_size)
    return SamplingParams(**values | cut | {"stop": tuple(sampling.stop), "stop_token_ids": tuple(sampling.stop_token_ids)})
