"""Jinja: the chat template of a checkpoint, and the request's own prompt template. Both run in a sandbox.

The environment follows what chat templates are written for, as `transformers` documents it ("Chat templates", writing a
template): trimmed blocks, loop controls, `raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML. A chat
template is a stranger's program: beyond jinja2's sandbox it gets no Python type to call unbound methods of.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from batchinfer.config import ConfigError
from batchinfer.data.tokenizer_files import load_special_tokens, read_json

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names for it in messages; templates read the first or the second
_OPEN_END = "<THE FINAL MESSAGE GOES ON HERE> "  # the space shows whether the template trims


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of a template, without names that could mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2's, so that an attribute may be called self
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute with a leading underscore: {name!r}")


class _Dict:
    """`dict` of a template: makes dicts, but has none of the type's methods, which could change what rows share."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


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


@dataclass(frozen=True, slots=True)
class _Source:
    """A template's text, and where it stands for messages about it."""

    text: str
    where: str


class ChatTemplate:
    """Renders a conversation to the text that a model was trained on."""

    def __init__(self, default: _Source, tool_use: _Source | None, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_Dict()
        )
        self._default = _compile(environment, default.text, default.where)
        self._tool_use = self._default if tool_use is None else _compile(environment, tool_use.text, tool_use.where)
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}

    @classmethod
    def load(cls, model_path: str | Path | None, override: str | None) -> ChatTemplate | None:
        """The template of a checkpoint, or what `model.chat_template` puts in its place: one of the checkpoint's by its name, a
        file, or the text itself. None when there is neither."""
        folder = None if model_path is None else Path(model_path)
        special_tokens = {} if folder is None else load_special_tokens(folder)
        named = {} if folder is None else _of_checkpoint(folder)
        if override is not None:
            return cls(named[override] if override in named else _overriding(override), None, special_tokens)
        if not named:
            return None
        if "default" not in named:
            raise ConfigError(
                f"model.path: {folder} has chat templates named {', '.join(sorted(named))} but no default; choose one with"
                " model.chat_template"
            )
        return cls(named["default"], named.get("tool_use"), special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt for these messages, ready for the assistant's turn. `kwargs` are variables of the template.

        With `continue_final_message=True` a last message of the assistant is left open, for the model to go on with it.
        Raises whatever the template does: it is the row's fault or the template's, and the caller's to report.
        """
        goes_on = kwargs.pop("continue_final_message", False) and bool(messages) and messages[-1].get("role") == "assistant"
        variables = {**self._variables, "messages": [_normal(message) for message in messages], **kwargs}
        template = self._default if variables["tools"] is None else self._tool_use
        return _render_open(template, variables) if goes_on else template.render(variables)


def _normal(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates are written for: no field that is null, and reasoning under each name that they read."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _render_open(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The prompt up to the end of the last message's content, found by a mark behind it (as `transformers` does).

    Raises jinja2.TemplateError when the last message has no text, or the template does not show it.
    """
    *before, last = variables["messages"]
    content = last.get("content")
    if not isinstance(content, str):
        raise jinja2.TemplateError("continue_final_message needs a last message whose content is text")
    marked = [*before, {**last, "content": content + _OPEN_END}]
    text = template.render({**variables, "messages": marked, "add_generation_prompt": False})
    end = text.rfind(_OPEN_END.rstrip())
    if end < 0 or content.strip() not in text:
        raise jinja2.TemplateError("continue_final_message: the template does not show the last message as it is")
    return text[:end] if text.startswith(_OPEN_END, end) else text[:end].rstrip()


def _overriding(override: str) -> _Source:
    if "{" not in override and "\n" not in override:
        try:
            return _Source(Path(override).read_text("utf-8"), f"model.chat_template ({override})")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.chat_template={override}: neither a readable file nor jinja2 text, nor the name of one of the"
                " checkpoint's templates; give one of the three"
            ) from error
    if "\n" not in override and os.path.isfile(override):
        return _Source(Path(override).read_text("utf-8"), f"model.chat_template ({override})")
    return _Source(override, "model.chat_template")


def _of_checkpoint(folder: Path) -> dict[str, _Source]:
    """Templates by name, from files where there is any, otherwise from tokenizer_config.json."""
    paths = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths = {"default": folder / "chat_template.jinja"} | paths
    if paths:
        return {name: _Source(path.read_text("utf-8"), f"model.path: {path}") for name, path in paths.items()}
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: _Source(entry["template"], f"model.path: {path}") for entry in template}
    return {} if template is None else {"default": _Source(template, f"model.path: {path}")}


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
