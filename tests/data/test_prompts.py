"""Rows become prompts and parameters; a bad row says what is wrong with it and harms no other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.config import Config, ConfigError, InputConfig, SamplingConfig
from batchinfer.data.chat import ChatTemplate
from batchinfer.data.prompts import PreparedRow, PromptBuilder, load_tokenizer, row_seed
from batchinfer.data.schema import ERROR_CODES
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.sequence import SamplingParams
from tests.data.lookalikes import TEMPLATES, llama_2, llama_3, mistral_v3, qwen

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.name is defined %}({{ m.name }}){% endif %}"
    "{% endfor %}{{ mood }}>"
)


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture
def prepare(tokenizer: Tokenizer) -> Any:
    def run(
        values: dict[str, Any],
        sampling: SamplingConfig | None = None,
        max_model_len: int = 500,
        vocab_size: int = 330,
        tokenizer: Tokenizer | None = tokenizer,
        **source: Any,
    ) -> list[PreparedRow]:
        config = Config(seed=7, input=InputConfig(**source), sampling=sampling or SamplingConfig())
        builder = PromptBuilder(config, tokenizer, ChatTemplate.load(None, CHAT), max_model_len, vocab_size, [1])
        table = pa.table(values)
        prepared = builder.prepare(table, [("s.parquet", 10 + i) for i in range(table.num_rows)])
        assert len(prepared) == table.num_rows
        for row in prepared:
            assert (row.error is None) == (row.token_ids is not None) == (row.sampling is not None) == (row.error_message is None)
            assert row.error is None or row.error in ERROR_CODES
            assert row.num_prompt_tokens == len(row.token_ids or [])
        return prepared

    return run


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_prompts_of_every_text_type(prepare: Any, tokenizer: Tokenizer, kind: pa.DataType) -> None:
    texts = ["Hello", None, "", "你好 🎉", " spaces "]
    column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
    rows = prepare({"p": column}, prompt_column="p")
    assert [row.error for row in rows] == [None, "null_prompt", None, None, None]
    for row, text in zip(rows, texts, strict=True):
        if text is not None:
            assert row.token_ids == tokenizer.encode_batch([text], True)[0] and row.token_ids[0] == 0


def test_chunks_and_slices(prepare: Any, tokenizer: Tokenizer) -> None:
    rows = prepare({"p": pa.chunked_array([["a", "b"], [], ["c", None]]).slice(1)}, prompt_column="p")
    assert [tokenizer.decode(row.token_ids) if row.token_ids else row.error for row in rows] == ["b", "c", "null_prompt"]


def test_an_empty_prompt_is_a_prompt(byte_fallback_folder: Path, tmp_path: Path, prepare: Any) -> None:
    adds_nothing = Tokenizer.load(byte_fallback_folder)
    (row,) = prepare({"p": [""]}, tokenizer=adds_nothing, prompt_column="p")
    assert row.token_ids == [adds_nothing.bos_token_id]
    for config, expected in (({"bos_token": None, "eos_token": "</s>"}, [2]), ({}, None)):
        (tmp_path / "tokenizer.json").write_bytes((byte_fallback_folder / "tokenizer.json").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (row,) = prepare({"p": [""]}, tokenizer=Tokenizer.load(tmp_path), prompt_column="p")
        assert row.token_ids == expected and row.error == (None if expected else "empty_prompt")
    (row,) = prepare({"ids": pa.array([[]], pa.list_(pa.int64()))}, tokenizer=None, token_ids_column="ids")
    assert row.error == "empty_prompt"


def test_text_that_is_not_unicode(prepare: Any) -> None:
    broken = pa.array([b"fine", b"\xff\xfe", b"fine too"]).view(pa.string())
    assert [row.error for row in prepare({"p": broken}, prompt_column="p")] == [None, "bad_prompt", None]
    rows = prepare({"p": broken}, prompt_template="{{ p }}")
    assert [row.error for row in rows] == [None, "template_error", None]
    (row,) = prepare({"m": [r'[{"role": "user", "content": "\ud800"}]']}, messages_column="m")
    assert row.error == "bad_prompt"


def test_token_ids(prepare: Any) -> None:
    values = [[5, 6], None, [], [1, None], [-1], [330], [329, 0]]
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int16())):
        rows = prepare({"ids": pa.array(values, kind)}, token_ids_column="ids")
        assert [row.error for row in rows] == [None, "null_prompt", None, "bad_token_ids", "bad_token_ids", "bad_token_ids", None]
        assert rows[0].token_ids == [5, 6] and rows[2].token_ids == [0]
    assert "token id 330 is outside the model's vocabulary of 330" in rows[5].error_message


def test_a_tokenizer_larger_than_the_model(prepare: Any) -> None:
    rows = prepare({"p": ["\n", "z" * 3]}, vocab_size=20, prompt_column="p")
    assert {row.error for row in rows} == {"bad_token_ids"}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("error", None),
        ("truncate_left", [4, 5, 6, 7]),
        ("truncate_right", [1, 2, 3, 4]),
    ],
)
def test_too_long(prepare: Any, policy: str, expected: list[int] | None) -> None:
    values = {"ids": [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]}
    fits, too_long = prepare(values, max_model_len=5, token_ids_column="ids", too_long=policy)
    assert fits.token_ids == [1, 2, 3, 4] and fits.sampling.max_tokens == 1
    assert too_long.token_ids == expected
    if expected is None:
        assert too_long.error == "prompt_too_long" and "has 7 tokens; model.max_model_len=5" in too_long.error_message


def test_max_tokens_is_cut_to_what_is_left(prepare: Any) -> None:
    sampling = SamplingConfig(max_tokens=100, min_tokens=50)
    (row,) = prepare({"ids": [[1] * 60]}, sampling, max_model_len=64, token_ids_column="ids")
    assert (row.sampling.max_tokens, row.sampling.min_tokens) == (4, 4)


def test_prompt_templates(prepare: Any, tokenizer: Tokenizer) -> None:
    values = {"q": ["1+1", None, "x"], "n": [2, 3, 0]}
    rows = prepare(values, prompt_template="Q: {{ q }} {{ 6 // n }}")
    assert [tokenizer.decode(row.token_ids) if row.token_ids else row.error for row in rows] == [
        "Q: 1+1 3",
        "Q: None 2",
        "template_error",
    ]
    assert "ZeroDivisionError" in rows[2].error_message


def decoded(rows: list[PreparedRow], tokenizer: Tokenizer) -> list[str | None]:
    return [tokenizer.decode(row.token_ids) if row.token_ids else row.error for row in rows]


def test_chats_as_structs_and_as_json(prepare: Any, tokenizer: Tokenizer) -> None:
    chats = [
        [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "name": "c"}],
        [{"role": "system", "content": "s", "name": None}, {"role": "user", "content": "é", "name": None}],
    ]
    for column in (pa.array(chats), pa.array([json.dumps(chat) for chat in chats]).dictionary_encode()):
        rows = prepare({"m": column}, messages_column="m", system_prompt="S", chat_template_kwargs={"mood": "!"})
        assert decoded(rows, tokenizer) == ["[system]S[user]a[assistant]b(c)!>", "[system]s[user]é!>"]
        assert rows[0].token_ids[0] != tokenizer.bos_token_id  # a template writes its special tokens itself


@pytest.mark.parametrize("kind", ["llama-2", "llama-3.1", "mistral", "qwen-2.5", "qwen-3"])
def test_chats_are_the_tokens_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    save = {"llama-2": llama_2, "llama-3.1": llama_3, "mistral": mistral_v3}.get(kind, qwen)
    (save(tmp_path) / "chat_template.jinja").write_text((TEMPLATES / f"{kind}.jinja").read_text("utf-8"), "utf-8")
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    question = {"role": "user", "content": "  what is é? "}
    chats = [[question], [question, {"role": "assistant", "content": "It is.", "name": "x"}, question]]
    variables = {"enable_thinking": False, "date_string": "1 Jan 2020"}
    config = Config(input=InputConfig(messages_column="m", system_prompt="Be brief.", chat_template_kwargs=variables))
    builder = PromptBuilder(config, Tokenizer.load(tmp_path), ChatTemplate.load(tmp_path, None), 1000, 1000)
    system = {"role": "system", "content": "Be brief."}
    expected = [
        oracle.apply_chat_template([system, *chat], add_generation_prompt=True, **variables)["input_ids"] for chat in chats
    ]
    for column in (pa.array(chats), pa.array([json.dumps(chat) for chat in chats])):
        rows = builder.prepare(pa.table({"m": column}), [("s", 0), ("s", 1)])
        assert [row.token_ids for row in rows] == expected


def test_fields_that_other_messages_have_are_not_there(prepare: Any, tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Graz"}}}
    other = {"function": {"name": "g", "arguments": {"day": 3}}}
    chat = [{"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "content": "b", "tool_calls": [other]}]
    template = ChatTemplate.load(None, "{% for m in messages %}{{ m.tool_calls | tojson }}{{ 'content' in m }}{% endfor %}")
    builder = PromptBuilder(Config(input=InputConfig(messages_column="m")), tokenizer, template, 500, 330)
    (row,) = builder.prepare(pa.table({"m": [chat]}), [("s", 0)])
    assert tokenizer.decode(row.token_ids or []) == f"{json.dumps([call])}False{json.dumps([other])}True"
    explicit = [{"role": "user", "content": "a", "tool_calls": [{"arguments": {"city": None}}]}]
    (row,) = builder.prepare(pa.table({"m": [json.dumps(explicit)]}), [("s", 0)])
    assert '"city": null' in tokenizer.decode(row.token_ids or [])


def test_a_row_that_ends_with_the_assistant(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load(
        None, "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{{ '>' if add_generation_prompt }}"
    )
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    for variables, expected in (
        ({}, ["[user]a;>", "[user]a;[assistant]b;>"]),
        ({"continue_final_message": True}, ["[user]a;>", "[user]a;[assistant]b"]),
    ):
        config = Config(input=InputConfig(messages_column="m", chat_template_kwargs=variables))
        rows = PromptBuilder(config, tokenizer, template, 500, 330).prepare(pa.table({"m": chats}), [("s", 0), ("s", 1)])
        assert decoded(rows, tokenizer) == expected


def test_plain_prompts_as_chats(prepare: Any, tokenizer: Tokenizer) -> None:
    rows = prepare({"p": ["a", None]}, prompt_column="p", apply_chat_template=True, system_prompt="S")
    assert decoded(rows, tokenizer) == ["[system]S[user]a>", "null_prompt"]
    rows = prepare({"p": ["a"]}, prompt_template="<{{ p }}>", apply_chat_template=True)
    assert decoded(rows, tokenizer) == ["[user]<a>>"]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "{",
        "{}",
        "[]",
        "3",
        '"text"',
        "[1]",
        "[null]",
        '[{"content": "a"}]',
        '[{"role": "user"}]',
        '[{"role": 1, "content": "a"}]',
        '[{"role": "user", "content": null}]',
        '[{"role": "user", "content": 5}]',
        '[{"role": "assistant", "content": null, "tool_calls": []}]',
        "[" * 100_000,
    ],
)
def test_bad_messages(prepare: Any, bad: str) -> None:
    good = '[{"role": "user", "content": "a"}]'
    rows = prepare({"m": [good, bad, good]}, messages_column="m")
    assert [row.error for row in rows] == [None, "bad_messages", None]


def test_bad_messages_in_structs(prepare: Any) -> None:
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    values = [None, [], [None], [{"role": None, "content": "a"}], [{"role": "user", "content": None}]]
    rows = prepare({"m": pa.array(values, kind)}, messages_column="m")
    assert [row.error for row in rows] == ["null_prompt", *["bad_messages"] * 4]


def test_a_chat_template_that_raises(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load(None, "{{ raise_exception('roles must alternate') }}")
    config = Config(input=InputConfig(messages_column="m"))
    builder = PromptBuilder(config, tokenizer, template, 100, 330)
    (row,) = builder.prepare(pa.table({"m": ['[{"role": "user", "content": "a"}]']}), [("s", 0)])
    assert row.error == "template_error" and "roles must alternate" in str(row.error_message)


def test_what_can_work_for_no_row_is_refused_at_the_start(tokenizer: Tokenizer) -> None:
    for source, key in (
        (InputConfig(messages_column="m"), "messages_column"),
        (InputConfig(prompt_column="p", apply_chat_template=True), "apply_chat_template"),
    ):
        with pytest.raises(ConfigError, match=f"input.{key} needs a chat template"):
            PromptBuilder(Config(input=source), tokenizer, None, 100, 330)
    with pytest.raises(ConfigError, match=r"text prompts need .*tokenizer\.json"):
        load_tokenizer(Config(input=InputConfig(prompt_column="p")))
    with pytest.raises(ConfigError, match=r"output\.token_ids=false"):
        load_tokenizer(Config(input=InputConfig(token_ids_column="t")))
    with pytest.raises(ConfigError, match=r"sampling\.stop=\['x'\]"):
        load_tokenizer(Config(input=InputConfig(token_ids_column="t"), sampling=SamplingConfig(stop=["x"])))


def test_a_row_with_stop_strings_and_no_tokenizer_is_an_error() -> None:
    config = Config(input=InputConfig(token_ids_column="t", sampling_column="s"))
    table = pa.table({"t": [[1], [2]], "s": ['{"stop": "x"}', "{}"]})
    rows = PromptBuilder(config, None, None, 100, 330).prepare(table, [("s", 0), ("s", 1)])
    assert [row.error for row in rows] == ["bad_sampling", None]


BASE = SamplingConfig(temperature=0.5, max_tokens=20, stop=["x"])


def override(prepare: Any, value: Any, kind: pa.DataType | None = None) -> PreparedRow:
    (row,) = prepare({"p": ["a"], "s": pa.array([value], kind)}, BASE, prompt_column="p", sampling_column="s")
    return row


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"max_tokens": 7.0, "top_k": 5}, {"max_tokens": 7, "top_k": 5}),
        ({"top_k": 10**30}, {"top_k": 330}),
        (
            {"stop": ["a", "b"], "stop_token_ids": [3], "ignore_eos": True},
            {"stop": ("a", "b"), "stop_token_ids": (3,), "ignore_eos": True},
        ),
        ({"stop": [], "min_p": None, "regex": None, "n": 1, "repetition_penalty": 1.0}, {"stop": ()}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"n": 2, "presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
    ],
)
def test_overrides(prepare: Any, given: dict[str, Any], expected: dict[str, Any]) -> None:
    wanted = SamplingParams(**{"temperature": 0.5, "max_tokens": 20, "stop": ("x",), **expected})
    assert override(prepare, json.dumps(given)).sampling == wanted
    if given and "top_k" not in given:
        assert override(prepare, given).sampling == wanted


def test_no_override(prepare: Any) -> None:
    for value, kind in ((None, pa.string()), ("null", pa.string()), (None, pa.struct([("top_k", pa.int8())]))):
        assert override(prepare, value, kind).sampling == SamplingParams(temperature=0.5, max_tokens=20, stop=("x",))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"temprature": 1}', "did you mean sampling.temperature"),
        ('{"temperature": -1}', "must be at least 0"),
        ('{"temperature": "hot"}', "must be a number"),
        ('{"temperature": NaN}', "finite"),
        ('{"temperature": ' + "9" * 400 + "}", "too large"),
        ('{"top_p": 0}', "must be above 0"),
        ('{"max_tokens": 0}', "must be at least 1"),
        ('{"max_tokens": 1.5}', "must be an integer"),
        ('{"max_tokens": true}', "must be an integer"),
        ('{"min_tokens": 21}', "at most sampling.max_tokens=20"),
        ('{"ignore_eos": 1}', "true or false"),
        ('{"stop": ""}', "must not be empty"),
        ('{"stop": 3}', "list of texts"),
        ('{"stop": [""]}', "must not be empty"),
        ('{"n": 0}', "must be at least 1"),
        ('{"n": 100000}', "at most 16384"),
        ('{"repetition_penalty": 0}', "must be above 0"),
        ('{"presence_penalty": 2.1}', "at least -2 and at most 2"),
        ('{"logprobs": 1}', "sampling.logprobs=1: the run has no column"),
        ('{"prompt_logprobs": 0}', "sampling.prompt_logprobs=0: the run has no column"),
        ('{"regex": 1}', "must be text"),
        ('{"regex": "a", "choice": ["a"]}', "sampling.regex and sampling.choice: at most one of them may be set"),
        ('{"choice": []}', "must name at least one string"),
        (r'{"\ud800": 1}', "no such key"),
        ("[1]", "must be an object"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_bad_overrides(prepare: Any, bad: str, words: str) -> None:
    row = override(prepare, bad)
    assert row.error == "bad_sampling" and words in row.error_message
    pa.array([row.error_message])  # whatever it quotes can be written


def test_messages_of_errors_are_of_bounded_length(prepare: Any) -> None:
    row = override(prepare, json.dumps({"a" * 10_000: 1}))
    assert row.error == "bad_sampling" and len(row.error_message) < 600


def accepted(row: PreparedRow, tokenizer: Tokenizer) -> str | None:
    """Which of a few texts the row's grammar takes as a whole; None: it has no grammar."""
    if row.grammar is None:
        return None
    texts = ["ab", "x", '{"k":1}', "null"]
    takes = {text: row.grammar.matcher.deep_copy() for text in texts}
    whole = [t for t in texts if takes[t].consume_tokens(tokenizer.encode_batch([t], False)[0]) and takes[t].is_accepting()]
    return " ".join(whole)


SCHEMA = {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]}


def test_a_rows_grammar_takes_the_place_of_the_configs(prepare: Any, tokenizer: Tokenizer) -> None:
    overrides = [None, {"regex": None, "top_k": 3}, {"regex": "a."}, {"choice": ["x", "y"]}, {"json_schema": SCHEMA}]
    overrides += [{"json_schema": json.dumps(SCHEMA)}, {"json_schema": {"const": None}}, {"regex": "("}, {"choice": ["\ud800"]}]
    values = {"p": ["p"] * len(overrides), "s": [None if o is None else json.dumps(o) for o in overrides]}
    source = {"prompt_column": "p", "sampling_column": "s"}
    rows = prepare(values, SamplingConfig(choice=["x"]), **source)
    assert [accepted(row, tokenizer) for row in rows[:7]] == ["x", "x", "ab", "x", '{"k":1}', '{"k":1}', "null"]
    assert [row.error for row in rows] == [None] * 7 + ["bad_grammar"] * 2
    assert rows[7].error_message == "sampling.regex=(: unclosed group"
    pa.array([row.error_message for row in rows])
    assert [accepted(row, tokenizer) for row in prepare(values, **source)[:3]] == [None, None, "ab"]
    assert rows[4].grammar is rows[5].grammar  # one text, compiled once


def test_a_struct_has_the_names_of_all_rows(prepare: Any, tokenizer: Tokenizer) -> None:
    structs = pa.array(
        [{"json_schema": SCHEMA}, {"json_schema": {"type": "string", "maxLength": 0, "enum": None}}, {"regex": "x"}]
    )
    assert structs[1].as_py()["json_schema"]["properties"] is None
    rows = prepare({"p": ["p"] * 3, "s": structs}, prompt_column="p", sampling_column="s")
    assert [row.error_message for row in rows] == [None] * 3
    assert [accepted(row, tokenizer) for row in rows] == ['{"k":1}', "", "x"]


def test_a_grammar_that_all_rows_share_is_refused_at_once(tokenizer: Tokenizer) -> None:
    source = InputConfig(token_ids_column="t")
    for sampling, reads_with, words in (
        (SamplingConfig(regex="("), tokenizer, r"sampling\.regex=\(: unclosed group"),
        (SamplingConfig(json_schema="{"), tokenizer, r"sampling\.json_schema=\{: not JSON"),
        (SamplingConfig(regex="a"), None, r"has no tokenizer\.json"),
    ):
        with pytest.raises(ConfigError, match=words):
            PromptBuilder(Config(input=source, sampling=sampling), reads_with, None, 100, 330, [1])


def test_bad_rows_do_not_move_their_neighbours(prepare: Any, tokenizer: Tokenizer) -> None:
    values = {"p": ["a", None, "c", "d"], "s": [None, None, "{", '{"max_tokens": 3}']}
    rows = prepare(values, prompt_column="p", sampling_column="s")
    assert decoded(rows, tokenizer) == ["a", "null_prompt", "bad_sampling", "d"]
    assert rows[3].sampling.max_tokens == 3


def test_seeds(prepare: Any) -> None:
    plain = prepare({"p": ["a", "b"]}, prompt_column="p")
    assert [row.seeds for row in plain] == [(row_seed(7, "s.parquet", 10, 0),), (row_seed(7, "s.parquet", 11, 0),)]
    (own,) = prepare({"p": ["a"]}, SamplingConfig(seed=0), prompt_column="p")
    assert own.seeds == (row_seed(0, "s.parquet", 10, 0),)
    how = ['{"seed": 3}', '{"n": 1}', '{"n": 0}']
    rows = prepare({"p": ["a", "b", "c"], "s": how}, SamplingConfig(seed=0, n=3), prompt_column="p", sampling_column="s")
    assert [row.seeds for row in rows] == [
        tuple(row_seed(3, "s.parquet", 10, sample) for sample in range(3)),
        (row_seed(0, "s.parquet", 11, 0),),
        (),
    ]


def test_row_seed_is_stable() -> None:
    expected = hashlib.blake2b(b'[0,"a/b.parquet",12,0]', digest_size=8).digest()
    assert row_seed(0, "a/b.parquet", 12, 0) == int.from_bytes(expected, "little")


SEED_ARGUMENTS = st.tuples(st.integers(), st.text(max_size=5), st.integers(0, 2**40), st.integers(0, 3))


@settings(max_examples=200)
@given(st.sets(SEED_ARGUMENTS, max_size=10))
def test_row_seeds_differ(arguments: set[tuple[int, str, int, int]]) -> None:
    seeds = {row_seed(*each) for each in arguments}
    assert len(seeds) == len(arguments) and all(0 <= seed < 2**64 for seed in seeds)
