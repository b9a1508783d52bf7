"""Typed access to the fields of a JSON object: an error names the file, the field, its value and what is valid. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchinfer.config import ConfigError


class Fields:
    """The object's values, and how error sentences call it. A field that is null counts as absent, unless `values` is asked."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def error(self, name: str, valid: str) -> ConfigError:
        return ConfigError(f"{self.source}: {name}={self.values.get(name)!r} must be {valid}")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool | None):
            raise self.error(name, "true or false")
        return default if value is None else value

    def nested(self, name: str) -> Fields:
        value = self.values.get(name)
        if not isinstance(value, Mapping | None):
            raise self.error(name, "an object or null")
        return Fields(value or {}, f"{self.source}: {name}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(name, "a token id, a list of them, or null")
        return tuple(ids)
