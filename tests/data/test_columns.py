"""What a request may ask of an input's columns, and what it is told when it cannot have it."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pytest

from batchinfer.config import Config, ConfigError, InputConfig, OutputConfig
from batchinfer.data.prompts import check_columns, columns_needed, columns_to_read

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("name", pa.string())])
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("large", pa.large_string()),
        ("view", pa.string_view()),
        ("dictionary", pa.dictionary(pa.int8(), pa.string())),
        ("number", pa.int64()),
        ("bytes", pa.binary()),
        ("messages", pa.list_(MESSAGE)),
        ("large messages", pa.large_list(MESSAGE)),
        ("no roles", pa.list_(pa.struct([("a", pa.string())]))),
        ("ids", pa.list_(pa.int32())),
        ("small ids", pa.large_list(pa.uint16())),
        ("floats", pa.list_(pa.float32())),
        ("options", pa.struct([("top_k", pa.int64())])),
        ("row", pa.int64()),
    ]
)
KEEP = OutputConfig(keep_columns=["number"])


def config(output: OutputConfig = KEEP, **source: object) -> Config:
    return Config(input=InputConfig(**source), output=output)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "column"),
    [
        *(("prompt_column", name) for name in ("text", "large", "view", "dictionary")),
        *(("messages_column", name) for name in ("messages", "large messages", "text", "dictionary")),
        *(("token_ids_column", name) for name in ("ids", "small ids")),
    ],
)
def test_good_columns(key: str, column: str) -> None:
    request = config(**{key: column})
    assert check_columns(SCHEMA, request) == ["number"]
    assert columns_needed(request.input, SCHEMA) == [column]
    assert columns_to_read(request.input, SCHEMA, ["number", column]) == ["number", column]


@pytest.mark.parametrize(
    ("key", "column", "words"),
    [
        ("prompt_column", "number", "'number' is int64; it must be text"),
        ("prompt_column", "bytes", "'bytes' is binary; it must be text"),
        ("messages_column", "no roles", "it must be a list of structs with role and content, or text"),
        ("messages_column", "ids", "'ids' is list<.*int32>; it must be"),
        ("token_ids_column", "floats", "it must be a list of integers"),
        ("token_ids_column", "text", "'text' is string; it must be a list of integers"),
    ],
)
def test_wrong_types(key: str, column: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"input.{key}: column .*{words}"):
        check_columns(SCHEMA, config(**{key: column}))


def test_sampling_columns() -> None:
    for column in ("options", "text", "dictionary"):
        request = config(prompt_column="view", sampling_column=column)
        check_columns(SCHEMA, request)
        assert columns_needed(request.input, SCHEMA) == ["view", column]
    with pytest.raises(ConfigError, match=r"input\.sampling_column: column 'ids' is .*must be a struct"):
        check_columns(SCHEMA, config(prompt_column="text", sampling_column="ids"))


def test_missing_columns_name_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"has no column 'txt'; did you mean 'text'\? columns: text, large"):
        check_columns(SCHEMA, config(prompt_column="txt"))
    with pytest.raises(ConfigError, match=r"output\.keep_columns: .*'numbr'; did you mean 'number'"):
        check_columns(SCHEMA, config(OutputConfig(keep_columns=["numbr"]), prompt_column="text"))


def test_one_source_of_the_prompt() -> None:
    with pytest.raises(ConfigError, match=r"input\.prompt_column and input\.prompt_template are set: exactly one"):
        check_columns(SCHEMA, config(prompt_column="text", prompt_template="{{ text }}"))
    with pytest.raises(ConfigError, match=r"none is set: exactly one of input\.prompt_column, input\.messages_column"):
        check_columns(SCHEMA, config())


def test_templates_need_their_columns() -> None:
    request = config(prompt_template="{{ number }}{% for x in ids %}{{ x + range(3)|length }}{% endfor %}")
    assert columns_needed(request.input, SCHEMA) == ["number", "ids"]
    with pytest.raises(ConfigError, match=r"input\.prompt_template: uses 'nmber'"):
        check_columns(SCHEMA, config(prompt_template="{{ nmber }}"))


def test_names_of_ours_clash() -> None:
    for keep in ("all", ["row"]):
        with pytest.raises(ConfigError, match=r"'row' have the names of output columns; set output\.prefix"):
            check_columns(SCHEMA, config(OutputConfig(keep_columns=keep), prompt_column="text"))
    assert check_columns(SCHEMA, config(OutputConfig(prefix="out_"), prompt_column="text")) == SCHEMA.names
    assert check_columns(SCHEMA, config(OutputConfig(keep_columns="none"), prompt_column="text")) == []
    taken = pa.schema([*SCHEMA, ("out_row", pa.int64())])
    with pytest.raises(ConfigError, match="'out_row' have the names"):
        check_columns(taken, config(OutputConfig(prefix="out_"), prompt_column="text"))


def test_token_ids_clash_only_when_they_are_written() -> None:
    schema = pa.schema([("token_ids", pa.list_(pa.int64()))])
    request = config(OutputConfig(), token_ids_column="token_ids")
    assert check_columns(schema, request) == ["token_ids"]
    with pytest.raises(ConfigError, match="'token_ids' have the names"):
        check_columns(schema, dataclasses.replace(request, output=OutputConfig(token_ids=True)))
