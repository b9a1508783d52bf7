"""Jinja: the chat template of a checkpoint, and the request's own prompt template. Both run in a sandbox.

The environment follows what chat templates are written for, as `transformers` documents it ("Chat templates", writing a
template): trimmed blocks, loop controls, `raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchinfer.config import ConfigError
from batchinfer.data.tokenizer_files import load_special_tokens, read_json


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(environment: jinja2.Environment, text: str, where: str) -> jinja2.Template:
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}: not a valid jinja2 template: line {error.lineno}: {error.message}") from error


class ChatTemplate:
    """Renders a conversation to the text that a model was trained on."""

    def __init__(self, text: str, where: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._template = _compile(environment, text, where)
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}

    @classmethod
    def load(cls, model_path: str | Path | None, override: str | None) -> ChatTemplate | None:
        """The template of a checkpoint, or the one that replaces it (`model.chat_template`); None when there is neither."""
        folder = None if model_path is None else Path(model_path)
        special_tokens = {} if folder is None else load_special_tokens(folder)
        found = _overriding(override) if override is not None else None if folder is None else _of_checkpoint(folder)
        return None if found is None else cls(*found, special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt for these messages, ready for the assistant's turn. `kwargs` are variables of the template.

        Raises whatever the template does: it is the row's fault or the template's, and the caller's to report.
        """
        return self._template.render({**self._variables, "messages": messages, **kwargs})


def _overriding(override: str) -> tuple[str, str]:
    """(template, where it stands) from a file's name or from the text itself."""
    if "{" not in override and "\n" not in override:
        try:
            return Path(override).read_text("utf-8"), f"model.chat_template ({override})"
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.chat_template={override}: neither a readable file nor jinja2 text; give one of the two"
            ) from error
    if "\n" not in override and os.path.isfile(override):
        return Path(override).read_text("utf-8"), f"model.chat_template ({override})"
    return override, "model.chat_template"


def _of_checkpoint(folder: Path) -> tuple[str, str] | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8"), f"model.path: {path}"
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ConfigError(
                f"model.path: {path} has chat templates named {', '.join(sorted(named))} but no default; choose one with"
                " model.chat_template"
            )
        template = named["default"]
    return None if template is None else (template, f"model.path: {path}")


class PromptTemplate:
    """`input.prompt_template`: jinja2 over the row's columns. A name that is no column is an error, never empty text."""

    def __init__(self, text: str) -> None:
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        environment.filters["tojson"] = _tojson
        self._template = _compile(environment, text, "input.prompt_template")
        self._functions = frozenset(environment.globals)
        bare = jinja2.Environment()
        bare.globals.clear()  # so that a column may have the name of a function
        self.names = jinja2.meta.find_undeclared_variables(bare.parse(text))

    def columns(self, available: Sequence[str]) -> list[str]:
        """The columns that the template reads, in the order of `available`. Raises ConfigError for a name that is none."""
        unknown = sorted(self.names - set(available) - self._functions)
        if unknown:
            raise ConfigError(
                f"input.prompt_template: uses {', '.join(map(repr, unknown))}, which the input does not have; columns:"
                f" {', '.join(available)}"
            )
        return [name for name in available if name in self.names]

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises whatever the template does."""
        return self._template.render(row)
