"""Chat templates render as transformers renders them, in a sandbox, and are found where checkpoints keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import ConfigError
from batchinfer.data.chat import ChatTemplate, PromptTemplate

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = \
messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}\
{% endfor %}"""

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if tools is not none %}
    {{- raise_exception("no tools here") }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if loop.first %}{{- 'Today is ' + date_string + '\\n' }}{%- endif %}
    {%- if message.tool_calls is defined %}
        {{- message.tool_calls | tojson(indent=2) }}
        {%- continue %}
    {%- endif %}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- set ns = namespace(index=0) %}
{{ bos_token }}
{% for message in messages %}
    {% if message.role == "system" %}
        {% continue %}
    {% endif %}
    {% set ns.index = ns.index + 1 %}
    {% if message.role == "user" %}
[INST] {{ ns.index }} {{ {"text": message.content} | tojson }} [/INST]
    {% else %}
{% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  Hi <b>'you' & \"me\"</b>, 你好 🎉  "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}, {"role": "user", "content": "c\n\nd"}],
]


VARIABLES = [{}, {"enable_thinking": False, "date_string": "1 Jan 2020"}, {"add_generation_prompt": False}]


@pytest.mark.parametrize("kwargs", VARIABLES)
@pytest.mark.parametrize("template", [LLAMA_2, LLAMA_3, MISTRAL, CHATML], ids=["llama 2", "llama 3", "mistral", "chatml"])
def test_equal_to_transformers(byte_level_folder: Path, template: str, kwargs: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast.from_pretrained(byte_level_folder)
    oracle.chat_template = template
    ours = ChatTemplate.load(byte_level_folder, template)
    assert ours is not None
    for chat in CHATS:
        expected = oracle.apply_chat_template(chat, tokenize=False, **{"add_generation_prompt": True, **kwargs})
        assert ours.render(chat, **kwargs) == expected


def test_tool_calls_are_json_without_escapes() -> None:
    template = ChatTemplate.load(None, LLAMA_3)
    assert template is not None
    chat = [{"role": "assistant", "content": None, "tool_calls": [{"name": "é<"}]}]
    assert '"name": "é<"' in template.render(chat, bos_token="")


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
    with pytest.raises(ConfigError, match="named rag but no default"):
        rendered(with_config(tmp_path, chat_template=named[:1]))


def test_wrong_templates_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.chat_template: not a valid jinja2 template: line 2"):
        ChatTemplate.load(None, "fine\n{% if %}")
    with pytest.raises(ConfigError, match="neither a readable file nor jinja2 text"):
        ChatTemplate.load(None, str(tmp_path / "nowhere.jinja"))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json' is not JSON"):
        (tmp_path / "tokenizer_config.json").write_text("{")
        ChatTemplate.load(tmp_path, None)


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"])
def test_templates_are_in_a_sandbox(attack: str) -> None:
    template = ChatTemplate.load(None, attack)
    assert template is not None
    with pytest.raises(Exception, match=r"unsafe|no"):
        template.render([])


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
