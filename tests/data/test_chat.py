"""Chat templates render as transformers renders them, in a sandbox, and are found where checkpoints keep them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest

from batchinfer.config import ConfigError
from batchinfer.data.chat import ChatTemplate, PromptTemplate
from batchinfer.data.tokenizer import Tokenizer
from tests.data.lookalikes import TEMPLATES, llama_2, llama_3, mistral_v3, qwen

TOOL = {"type": "function", "function": {"name": "weather", "description": "é <b>", "parameters": {"type": "object"}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": 'Graz & "Linz"'}}}
ANSWER = {"role": "tool", "name": "weather", "content": '{"sun": true}', "tool_call_id": "abcdefghi"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("  Hi <b>'you' & \"me\"</b>, 你好 🎉  ")],
    "system": [SYSTEM, user("1+1?")],
    "several turns": [SYSTEM, user("a"), assistant(" b "), user("c\n\nd")],
    "fields that are null": [user("a") | {"name": None}, assistant("b", tool_calls=None), user("c")],
    "thoughts in text": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")],
    "thoughts of their own": [user("a"), assistant("b", reasoning_content="hm"), assistant("c", thinking="so")],
    "a tool's answer": [user("sun?"), assistant(None, tool_calls=[CALL]), ANSWER],
    "behind a tool's answer": [user("sun?"), assistant(None, tool_calls=[CALL]), ANSWER, assistant("Yes."), user("x")],
    "two answers": [user("sun?"), assistant("hm", tool_calls=[CALL, CALL]), ANSWER, ANSWER],
    "the assistant last": [user("a"), assistant("b")],
    "roles out of order": [user("a"), user("b")],
    "the assistant first": [assistant("b")],
    "only a system": [SYSTEM],
    "parts of text": [user([{"type": "text", "text": "hello"}])],
    "unknown role": [{"role": "judge", "content": "guilty"}],
}
PLAIN = ("one turn", "system", "several turns")
KWARGS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"enable_thinking": False, "date_string": "1 Jan 2020"},
    {"enable_thinking": True, "builtin_tools": ["shell", "search"]},
    {"tools": [TOOL, TOOL]},
    {"tools": [TOOL], "tools_in_user_message": False, "bos_token": "<other>"},
]
KINDS = {"llama-2": llama_2, "llama-3.1": llama_3, "mistral": mistral_v3, "qwen-2.5": qwen, "qwen-3": qwen}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = KINDS[request.param](tmp_path_factory.mktemp("checkpoint"))
    (folder / "chat_template.jinja").write_text((TEMPLATES / f"{request.param}.jinja").read_text("utf-8"), "utf-8")
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> ChatTemplate:
    template = ChatTemplate.load(folder, None)
    assert template is not None
    return template


def outcome(render: Callable[[], str]) -> str:
    """The text, or the name of what was raised."""
    try:
        return render()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_equal_to_transformers(ours: ChatTemplate, oracle: Any, kwargs: dict[str, Any]) -> None:
    for name, chat in CHATS.items():
        variables = {"add_generation_prompt": True, **kwargs}
        expected = outcome(lambda chat=chat, v=variables: oracle.apply_chat_template(chat, tokenize=False, **v))
        assert outcome(lambda chat=chat: ours.render(chat, **kwargs)) == expected, name
        assert name not in PLAIN or "Error: " not in expected, "comparing errors proves little"


def test_the_same_tokens_as_transformers(folder: Path, ours: ChatTemplate, oracle: Any) -> None:
    tokenizer = Tokenizer.load(folder)
    for name in PLAIN:
        expected = oracle.apply_chat_template(CHATS[name], tokenize=True, add_generation_prompt=True)["input_ids"]
        assert tokenizer.encode_batch([ours.render(CHATS[name])], add_special_tokens=False) == [expected]
        assert expected.count(tokenizer.bos_token_id) <= 1 + (name == "several turns")  # Llama 2 has one for every question


@pytest.mark.parametrize("last", ["b", " b  ", "b\n", "a", "<think>\nhm\n</think>\n\nb"])
def test_the_last_message_goes_on(ours: ChatTemplate, oracle: Any, last: str) -> None:
    chat = [SYSTEM, user("a"), assistant("x"), user("a"), assistant(last)]
    expected = oracle.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert ours.render(chat, continue_final_message=True) == expected and expected.rstrip().endswith(last.strip())
    asks = chat[:-1]
    assert ours.render(asks, continue_final_message=True) == ours.render(asks, continue_final_message=False) == ours.render(asks)


def test_a_last_message_that_the_template_changes_cannot_go_on() -> None:
    for text, content in (
        ("{{ messages[0].content | upper }}", "a"),
        ("nothing{# #}", "a"),
        ("{{ messages[0].content }}", ["a"]),
    ):
        template = ChatTemplate.load(None, text)
        assert template is not None
        with pytest.raises(Exception, match="continue_final_message"):
            template.render([{"role": "assistant", "content": content}], continue_final_message=True)


def test_tool_calls_are_json_without_escapes() -> None:
    template = ChatTemplate.load(None, "{{ messages[0].tool_calls | tojson(indent=2) }}{{ messages[0].content is defined }}")
    assert template is not None
    assert template.render([assistant(None, tool_calls=[{"name": "é<"}])]) == '[\n  {\n    "name": "é<"\n  }\n]False'


def with_config(folder: Path, **config: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def rendered(folder: Path | None, override: str | None = None) -> str | None:
    template = ChatTemplate.load(folder, override)
    return None if template is None else template.render([])


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert rendered(None) is None
    assert rendered(tmp_path) is None
    with_config(tmp_path, chat_template="config {{ bos_token }}", bos_token={"content": "<s>"})
    assert rendered(tmp_path) == "config <s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert rendered(tmp_path) == "file <s>"
    (tmp_path / "mine").write_text("mine {{ bos_token }}")
    assert rendered(tmp_path, str(tmp_path / "mine")) == "mine <s>"
    assert rendered(tmp_path, "text {{ bos_token }}") == "text <s>"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    assert rendered(with_config(tmp_path, chat_template=named)) == "default"
    assert rendered(tmp_path, "rag") == "rag"
    with pytest.raises(ConfigError, match="named rag but no default"):
        rendered(with_config(tmp_path, chat_template=named[:1]))
    assert rendered(tmp_path, "rag") == "rag"


def test_named_templates_in_files(byte_level_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "checkpoint"
    shutil.copytree(byte_level_folder, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "chat_template.jinja").write_text("default")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(name)
    oracle, ours = AutoTokenizer.from_pretrained(folder), ChatTemplate.load(folder, None)
    assert ours is not None
    for tools, expected in ((None, "default"), ([TOOL], "tool_use")):
        theirs = oracle.apply_chat_template([user("a")], tools=tools, tokenize=False)
        assert ours.render([user("a")], tools=tools) == theirs == expected
    assert rendered(folder, "rag") == "rag"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"named rag, tool_use but no default; choose one with model\.chat_template"):
        ChatTemplate.load(folder, None)


def test_wrong_templates_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.chat_template: not a valid jinja2 template: line 2"):
        ChatTemplate.load(None, "fine\n{% if %}")
    with pytest.raises(ConfigError, match="neither a readable file nor jinja2 text"):
        ChatTemplate.load(None, str(tmp_path / "nowhere.jinja"))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json' is not JSON"):
        (tmp_path / "tokenizer_config.json").write_text("{")
        ChatTemplate.load(tmp_path, None)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.update(shared, x=1) }}",
    ],
)
def test_templates_are_in_a_sandbox(attack: str) -> None:
    template, shared = ChatTemplate.load(None, attack), {"a": 1}
    assert template is not None
    with pytest.raises(jinja2.TemplateError):
        template.render([], shared=shared)
    assert shared == {"a": 1}


def test_namespaces_and_dicts() -> None:
    template = ChatTemplate.load(
        None,
        "{% set ns = namespace(self=1, x=2) %}{% set ns.x = 3 %}{{ ns.self }}{{ ns.x }}"
        "{{ dict(a=1) }}{{ dict.fromkeys(['b'], 2) }}{{ dict.fromkeys('c') }}",
    )
    assert template is not None
    assert template.render([]) == "13{'a': 1}{'b': 2}{'c': None}"


class TestPromptTemplate:
    def test_columns_and_values(self) -> None:
        template = PromptTemplate("{% for i in range(n) %}{{ items[i].name }} {% endfor %}{% set x = 1 %}{{ x }}{{ t | tojson }}")
        assert template.columns(["t", "other", "items", "n"]) == ["t", "items", "n"]
        assert template.render({"n": 2, "items": [{"name": "a"}, {"name": "b"}], "t": "<é>"}) == 'a b 1"<é>"'

    def test_a_column_may_have_the_name_of_a_function(self) -> None:
        template = PromptTemplate("{{ range }}")
        assert template.columns(["range"]) == ["range"]
        assert template.render({"range": "far"}) == "far"

    def test_unknown_columns(self) -> None:
        with pytest.raises(ConfigError, match="uses 'a', 'c', which the input does not have; columns: b"):
            PromptTemplate("{{ a }}{{ b }}{{ c }}").columns(["b"])

    def test_wrong_syntax_names_the_line(self) -> None:
        with pytest.raises(ConfigError, match=r"input\.prompt_template: .*line 3"):
            PromptTemplate("a\nb\n{{ c")

    def test_fields_that_do_not_exist_raise(self) -> None:
        with pytest.raises(Exception, match="no attribute 'b'"):
            PromptTemplate("{{ a.b }}").render({"a": {}})
