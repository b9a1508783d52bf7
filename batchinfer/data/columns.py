"""Which input columns a request reads and keeps, and whether they are of types that can mean what the request says.

All of it is decided from the schema, before anything starts: a ConfigError names the column, its type and what is valid.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import pyarrow as pa

from batchinfer.config import Config, ConfigError, InputConfig, OutputConfig
from batchinfer.data.chat import PromptTemplate
from batchinfer.data.writer import our_fields


def is_text(kind: pa.DataType) -> bool:
    """Any of Arrow's strings, or a dictionary of them."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(test(kind) for test in tests) or pa.types.is_large_list_view(kind)


def _is_messages(kind: pa.DataType) -> bool:
    if not _is_list(kind):
        return is_text(kind)
    item = kind.value_type
    return pa.types.is_struct(item) and {"role", "content"} <= {field.name for field in item}


def _is_token_ids(kind: pa.DataType) -> bool:
    return _is_list(kind) and pa.types.is_integer(kind.value_type)


def _is_sampling(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or is_text(kind)


_KEYS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "prompt_column": (is_text, "text (string, large_string, string_view, or a dictionary of them)"),
    "messages_column": (_is_messages, "a list of structs with role and content, or text that holds the same as JSON"),
    "token_ids_column": (_is_token_ids, "a list of integers"),
    "sampling_column": (_is_sampling, "a struct of sampling keys, or text that holds a JSON object of them"),
}


def columns_needed(source: InputConfig, schema: pa.Schema) -> list[str]:
    """The columns that prompts and sampling of a row are made from, each once. Raises ConfigError when one is missing."""
    names = [getattr(source, key) for key in _KEYS if getattr(source, key) is not None]
    for key in _KEYS:
        if getattr(source, key) is not None:
            _require_column(f"input.{key}", getattr(source, key), schema)
    if source.prompt_template is not None:
        names += PromptTemplate(source.prompt_template).columns(schema.names)
    return list(dict.fromkeys(names))


def columns_to_read(source: InputConfig, schema: pa.Schema, kept: list[str]) -> list[str]:
    """What a unit's reader asks for, and what a unit's `input_hash` is taken over: the kept columns, then others needed."""
    return list(dict.fromkeys([*kept, *columns_needed(source, schema)]))


def check_columns(schema: pa.Schema, config: Config) -> list[str]:
    """The input columns to keep, in the input's order for `all`, else in the order asked for. Raises ConfigError."""
    sources = [key for key in (*_KEYS, "prompt_template") if key != "sampling_column" and getattr(config.input, key) is not None]
    if len(sources) != 1:
        found = " and ".join(f"input.{key}" for key in sources) + " are set" if sources else "none is set"
        options = ", ".join(f"input.{key}" for key in (*_KEYS, "prompt_template") if key != "sampling_column")
        raise ConfigError(f"{found}: exactly one of {options} must say what the prompt is")
    columns_needed(config.input, schema)
    for key, (is_valid, wanted) in _KEYS.items():
        name = getattr(config.input, key)
        if name is not None and not is_valid(schema.field(name).type):
            raise ConfigError(f"input.{key}: column {name!r} is {schema.field(name).type}; it must be {wanted}")
    kept = _kept(schema, config.output)
    _require_no_clash(kept, config)
    return kept


def _require_column(key: str, name: str, schema: pa.Schema) -> None:
    if name not in schema.names:
        close = difflib.get_close_matches(name, schema.names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{key}: the input has no column {name!r}; {hint}columns: {', '.join(schema.names)}")


def _kept(schema: pa.Schema, output: OutputConfig) -> list[str]:
    if isinstance(output.keep_columns, str):
        return list(schema.names) if output.keep_columns == "all" else []
    for name in output.keep_columns:
        _require_column("output.keep_columns", name, schema)
    return list(dict.fromkeys(output.keep_columns))


def _require_no_clash(kept: list[str], config: Config) -> None:
    ours, prefix = {field.name for field in our_fields(config)}, config.output.prefix
    clashes = [name for name in kept if name in ours]
    if clashes:
        raise ConfigError(
            f"output.prefix={prefix}: input columns {', '.join(map(repr, clashes))} have the names of output columns;"
            " set output.prefix (for example output.prefix=out_), or leave them out with output.keep_columns"
        )
