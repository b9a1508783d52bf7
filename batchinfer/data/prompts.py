"""A table of input rows becomes prompts: text is rendered, chats go through the template, everything is tokenised at once.

Whatever is wrong with a row is said in its `PreparedRow`; only a request that can work for no row raises.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchinfer.config import Config, ConfigError, SamplingConfig
from batchinfer.data.chat import ChatTemplate, PromptTemplate
from batchinfer.data.columns import check_columns, columns_needed, columns_to_read
from batchinfer.data.grammar import BadGrammar, GrammarCompiler
from batchinfer.data.sampling import BadSampling, row_sampling, to_params
from batchinfer.data.schema import ERROR_CODES
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.sequence import Grammar, SamplingParams

__all__ = ["PreparedRow", "PromptBuilder", "check_columns", "columns_needed", "columns_to_read", "row_seed"]

_MESSAGE_LENGTH = 500


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row ready for the engine, or (`error`, one of schema.ERROR_CODES, and a sentence) why it is not.

    `num_prompt_tokens` counts the tokens handed to the engine; 0 for an error. `seeds`: one for each sample; none for an error.
    """

    token_ids: list[int] | None
    sampling: SamplingParams | None
    seeds: tuple[int, ...]
    error: str | None
    error_message: str | None
    num_prompt_tokens: int
    grammar: Grammar | None = None


class RowError(Exception):
    """What is wrong with one row: its code and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        assert code in ERROR_CODES
        self.code = code


def row_seed(seed: int, shard: str, row: int, sample: int) -> int:
    """Unsigned 64-bit seed of one sample's random draws: BLAKE2b over the run's seed and the row's name, in a fixed spelling."""
    name = json.dumps([seed, shard, row, sample], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row on the way: text still to be tokenised, or token ids that are ready."""

    sampling: SamplingConfig
    grammar: Grammar | None
    content: str | list[int]


def load_tokenizer(config: Config) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where only token ids go in and come out. Raises ConfigError when one is missing."""
    path = config.model.path
    if path is not None and (Path(path) / "tokenizer.json").exists():
        return Tokenizer.load(path)
    if config.input.token_ids_column is None:
        if path is None:
            raise ConfigError(
                "model.path=null: text prompts need a checkpoint folder with tokenizer.json; without one only"
                " input.token_ids_column works"
            )
        return Tokenizer.load(path)  # says what is missing
    if config.sampling.stop:
        raise ConfigError(
            f"sampling.stop={config.sampling.stop}: model.path={path} has no tokenizer.json to look for text with; "
            "use sampling.stop_token_ids"
        )
    if not config.output.token_ids:
        raise ConfigError(f"output.token_ids=false: model.path={path} has no tokenizer.json to make text with; set it to true")
    return None


class PromptBuilder:
    """Turns rows into `PreparedRow`s. Holds no state between calls but compiled grammars; any thread may call `prepare`."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """Raises ConfigError for what is missing or malformed: templates, and the grammar that all rows share."""
        source = config.input
        self._config, self._source = config, source
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self._prompt_template = None if source.prompt_template is None else PromptTemplate(source.prompt_template)
        self._is_chat = source.messages_column is not None or source.apply_chat_template
        if self._is_chat and chat_template is None:
            key = "input.messages_column" if source.messages_column is not None else "input.apply_chat_template"
            raise ConfigError(f"{key} needs a chat template and the checkpoint has none; give one with model.chat_template")
        self._grammars = GrammarCompiler(tokenizer, vocab_size, eos_token_ids)
        try:
            self._grammars.compile(config.sampling)
        except BadGrammar as error:
            raise ConfigError(str(error)) from error

    def prepare(self, table: pa.Table, keys: Sequence[tuple[str, int]]) -> list[PreparedRow]:
        """One PreparedRow for each row of `table`, whose names are `keys` (shard path, row)."""
        values = {name: _python_values(table.column(name)) for name in columns_needed(self._source, table.schema)}
        drafts = [self._draft({name: values[name][i] for name in values}) for i in range(table.num_rows)]
        token_ids = self._tokenize([draft.content if isinstance(draft, _Draft) else [] for draft in drafts])
        return [self._prepared(draft, ids, key) for draft, ids, key in zip(drafts, token_ids, keys, strict=True)]

    @functools.cached_property
    def _all_in_vocabulary(self) -> bool:
        """No text can have an id that the model does not know, so that none has to be looked through."""
        is_text = self._source.token_ids_column is None
        return is_text and self._tokenizer is not None and self._tokenizer.largest_id < self._vocab_size

    def _draft(self, row: Mapping[str, Any]) -> _Draft | RowError:
        try:
            sampling = self._sampling(row)
            return _Draft(sampling, self._grammar(sampling), self._content(row))
        except RowError as error:
            return error

    def _sampling(self, row: Mapping[str, Any]) -> SamplingConfig:
        if self._source.sampling_column is None:
            return self._config.sampling
        value = row[self._source.sampling_column]
        if isinstance(value, _Unreadable):
            raise RowError("bad_sampling", f"sampling overrides cannot be read: {value.reason}")
        try:
            sampling = row_sampling(self._config.sampling, value)
        except BadSampling as error:
            raise RowError("bad_sampling", str(error)) from error
        if sampling.stop and self._tokenizer is None:
            raise RowError("bad_sampling", "stop strings need a tokenizer, and the checkpoint has none; use stop_token_ids")
        return sampling

    def _grammar(self, sampling: SamplingConfig) -> Grammar | None:
        try:
            return self._grammars.compile(sampling)
        except BadGrammar as error:
            raise RowError("bad_grammar", str(error)) from error

    def _content(self, row: Mapping[str, Any]) -> str | list[int]:
        if self._source.token_ids_column is not None:
            return _given_token_ids(row[self._source.token_ids_column])
        text = self._chat(row) if self._is_chat else self._prompt(row)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError("bad_prompt", f"the prompt is not valid Unicode text: {error}") from error
        return text

    def _prompt(self, row: Mapping[str, Any]) -> str:
        if self._prompt_template is not None:
            return _templated(self._prompt_template, row)
        assert self._source.prompt_column is not None  # check_columns: one source is set
        value = row[self._source.prompt_column]
        if value is None:
            raise RowError("null_prompt", "the prompt is null")
        if isinstance(value, _Unreadable):
            raise RowError("bad_prompt", f"the prompt cannot be read: {value.reason}")
        return str(value)

    def _chat(self, row: Mapping[str, Any]) -> str:
        column = self._source.messages_column
        messages = [{"role": "user", "content": self._prompt(row)}] if column is None else _messages(row[column])
        if self._source.system_prompt is not None and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": self._source.system_prompt}, *messages]
        assert self._chat_template is not None  # __init__
        try:
            return self._chat_template.render(messages, **self._source.chat_template_kwargs)
        except Exception as error:  # a template may raise anything, and only this row is concerned
            raise RowError("template_error", f"the chat template failed: {type(error).__name__}: {error}") from error

    def _tokenize(self, contents: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of each row, texts in one call. A chat template writes its special tokens itself."""
        texts = [content for content in contents if isinstance(content, str)]
        if not texts or self._tokenizer is None:
            return [content for content in contents if not isinstance(content, str)]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=not self._is_chat))
        return [next(encoded) if isinstance(content, str) else content for content in contents]

    def _prepared(self, draft: _Draft | RowError, token_ids: list[int], key: tuple[str, int]) -> PreparedRow:
        try:
            if isinstance(draft, RowError):
                raise draft
            fitted = self._fit(token_ids)
        except RowError as error:
            return PreparedRow(None, None, (), error.code, _plain(str(error)), 0)
        sampling = to_params(draft.sampling, self._max_model_len - len(fitted), self._vocab_size)
        return PreparedRow(fitted, sampling, self._seeds(draft.sampling, key), None, None, len(fitted), draft.grammar)

    def _seeds(self, sampling: SamplingConfig, key: tuple[str, int]) -> tuple[int, ...]:
        seed = self._config.seed if sampling.seed is None else sampling.seed
        return tuple(row_seed(seed, *key, sample) for sample in range(sampling.n))

    def _fit(self, token_ids: list[int]) -> list[int]:
        """The ids as the model can take them: at least one, in the vocabulary, and with room for one token more."""
        token_ids = token_ids or self._beginning()
        if not self._all_in_vocabulary and (min(token_ids) < 0 or max(token_ids) >= self._vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self._vocab_size)
            raise RowError("bad_token_ids", f"token id {wrong} is outside the model's vocabulary of {self._vocab_size:,}")
        room = self._max_model_len - 1
        if len(token_ids) <= room:
            return token_ids
        if self._source.too_long == "error":
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(token_ids):,} tokens; model.max_model_len={self._max_model_len} leaves room for {room:,}",
            )
        return token_ids[-room:] if self._source.too_long == "truncate_left" else token_ids[:room]

    def _beginning(self) -> list[int]:
        """What stands for an empty prompt: the token that begins a text, or else the one that ends the text before."""
        ids = [] if self._tokenizer is None else [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id]
        for token_id in ids:
            if token_id is not None:
                return [token_id]
        raise RowError("empty_prompt", "the prompt has no tokens, and the tokenizer has no bos or eos token to begin with")


def _plain(message: str) -> str:
    """A sentence that Arrow can hold: it may quote a row's text, with anything in it and of any length."""
    text = message.encode(errors="replace").decode()
    return text if len(text) <= _MESSAGE_LENGTH else text[:_MESSAGE_LENGTH] + "..."


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A value that Arrow cannot turn into a Python one, such as text that is not UTF-8."""

    reason: str


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, pa.ArrowException):  # UnicodeDecodeError is a ValueError; one bad value must not take its neighbours
        return [_python_value(value) for value in column]


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, pa.ArrowException) as error:
        return _Unreadable(str(error))


def samples_asked(base: SamplingConfig, column: pa.ChunkedArray) -> list[int]:
    """How many samples the rows of `input.sampling_column` ask for; 1 where what a row says is wrong, and so the row an error."""
    return [_samples(base, value) for value in _python_values(column)]


def _samples(base: SamplingConfig, value: Any) -> int:
    try:
        return row_sampling(base, value).n
    except BadSampling:
        return 1


def _templated(template: PromptTemplate, row: Mapping[str, Any]) -> str:
    values = {name: value for name, value in row.items() if name in template.names}
    try:
        for name, value in values.items():
            if isinstance(value, _Unreadable):
                raise ValueError(f"column {name!r} cannot be read: {value.reason}")
        return template.render(values)
    except Exception as error:  # a template may raise anything, and only this row is concerned
        raise RowError("template_error", f"input.prompt_template failed: {type(error).__name__}: {error}") from error


def _given_token_ids(value: Any) -> list[int]:
    if value is None:
        raise RowError("null_prompt", "the token ids are null")
    if None in value:
        raise RowError("bad_token_ids", f"token id {value.index(None)} of the row is null")
    return list(value)


def _messages(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, _Unreadable):
        raise RowError("bad_messages", f"the messages cannot be read: {value.reason}")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError("bad_messages", f"the messages are not JSON: {error}") from error
    else:
        value = _without_nulls(value)
    if value is None:
        raise RowError("null_prompt", "the messages are null")
    if not isinstance(value, list) or not value:
        raise RowError("bad_messages", "the messages must be a list of at least one {role, content}")
    for i, message in enumerate(value):
        _check_message(i, message)
    return value


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column the fields of all of them; templates ask whether a field is there."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise RowError("bad_messages", f"message {index} is {type(message).__name__}, not {{role, content}}")
    if not isinstance(message.get("role"), str):
        raise RowError("bad_messages", f"message {index} has no role, which must be text")
    content = message.get("content")
    if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
        raise RowError("bad_messages", f"message {index} has no content, which must be text")
