"""One raw value of a request: whether it is of the type and in the range that its key asks for, and what to say if not.

Nothing is converted silently: an integer becomes a float where a number is asked for, one text a list of it, and no more.
"""

from __future__ import annotations

import difflib
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """The request is wrong: one sentence naming the field, its value and what is valid. The command line exits with 2."""


def unknown_key(name: str, prefix: str, names: list[str]) -> ConfigError:
    """The error for a key that `prefix` (a group with its dot, or empty: the top) does not have."""
    close = difflib.get_close_matches(name.removeprefix(prefix).split(".")[0], names, n=1)
    hint = f"did you mean {prefix}{close[0]}? " if close else ""
    where = f"keys of {prefix[:-1]}" if prefix else "keys at the top"
    return ConfigError(f"{name}: no such key; {hint}{where}: {', '.join(names)}")


def show(name: str, value: Any) -> str:
    """`name=value` as a user would write it."""
    return f"{name}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(name)}: {_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


_TYPE_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", types.NoneType: "null"}


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        *others, last = map(_describe, typing.get_args(hint))
        return f"{', '.join(others)} or {last}"
    if typing.get_origin(hint) is list:
        return "a list of integers, [1,2]," if typing.get_args(hint) == (int,) else "a list of texts, [a,b],"
    return "a group of names and values" if typing.get_origin(hint) is dict else _TYPE_NAMES[hint]


def typed(hint: Any, raw: Any, name: str) -> Any:
    """`raw` as a value of the type `hint`: integers become floats where asked, and one text a list of it; no more than that."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(raw, str) and list[str] in options and str not in options:
        raw = [raw]
    for option in options:
        if _matches(option, raw):
            return _plain(float(raw) if option is float else raw, name)
    raise ConfigError(f"{show(name, raw)}: must be {_describe(hint).rstrip(',')}{_remedy(options, raw)}")


def _remedy(options: Sequence[Any], raw: Any) -> str:
    """What is shown of 3 and of the text 3 is the same: so say which it is, or how to write the other."""
    items = raw if isinstance(raw, list | tuple) else [raw]
    if str not in options and list[str] not in options:
        return ", not text" if any(isinstance(item, str) for item in items) else ""
    takes_mapping = any(typing.get_origin(option) is dict for option in options)
    is_bare = any(isinstance(item, bool | int | float) for item in items)
    return "; quote numbers, true and false to make them text" if is_bare and not takes_mapping else ""


def _matches(hint: Any, raw: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is list:
        return isinstance(raw, list | tuple) and all(_matches(typing.get_args(hint)[0], item) for item in raw)
    if origin is dict:
        return isinstance(raw, Mapping)
    if isinstance(raw, bool):
        return hint is bool
    return isinstance(raw, (int, float) if hint is float else hint)


def _plain(value: Any, name: str) -> Any:
    """A copy made of what JSON can say: mappings with text keys, lists, finite numbers, text, true, false, null."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{show(name, dict(value))}: the name {key!r} must be text")
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{show(name, value)}: must be a finite number")
    if not isinstance(value, str | int | float | None):
        raise ConfigError(f"{show(name, value)}: must be a plain value, not a {type(value).__name__}")
    return value


_BOUNDS = (("above", "above", operator.gt), ("minimum", "at least", operator.ge), ("maximum", "at most", operator.le))


def valid_range(checks: Mapping[str, Any]) -> str:
    """What the checks of a key allow, in words; empty when its type says all."""
    if "choices" in checks:
        return f"one of {', '.join(map(_text, checks['choices']))}"
    if "each" in checks:
        return f"a list of {', '.join(checks['each'])}"
    return " and ".join(f"{word} {checks[key]}" for key, word, _ in _BOUNDS if key in checks)


def check_range(checks: Mapping[str, Any], value: Any, name: str) -> None:
    """Raises ConfigError for a value of the right type that the checks of its key do not allow. Null passes bounds."""
    if "choices" in checks and value not in checks["choices"]:
        raise ConfigError(f"{show(name, value)}: must be {valid_range(checks)}")
    if "each" in checks and any(item not in checks["each"] for item in value or ()):
        raise ConfigError(f"{show(name, value)}: must be {valid_range(checks)}")
    if value is not None and not all(holds(value, checks[key]) for key, _, holds in _BOUNDS if key in checks):
        raise ConfigError(f"{show(name, value)}: must be {valid_range(checks)}")
