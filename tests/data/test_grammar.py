"""Grammars compile once, refuse with a reason, and allow exactly the tokens that keep the decoded text within them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from llguidance import LLMatcher
from tokenizers import models

from batchinfer.config import SamplingConfig
from batchinfer.data.grammar import CACHED_GRAMMARS, BadGrammar, GrammarCompiler, load_ll_tokenizer, reason
from batchinfer.data.tokenizer import Tokenizer

CHOICES = ["a", "ab", " ab", "é", "🎉", "你好", '"q"\t\\', "/x/\n", "{}", "</s>", "<s> a", "Hello world", " ", "", "\x7f"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 2},
        "pair": {"$ref": "#/$defs/pair"},
    },
    "required": ["name", "age", "tags", "pair"],
    "additionalProperties": False,
    "$defs": {
        "pair": {"type": "object", "properties": {"x": {"const": "</s>"}}, "required": ["x"], "additionalProperties": False}
    },
}


@pytest.fixture(params=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest, byte_level_folder: Path, byte_fallback_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder if request.param == "byte level" else byte_fallback_folder)


@pytest.fixture(scope="module")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


def eos_of(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_token_id is not None
    return tokenizer.eos_token_id


def num_ids(tokenizer: Tokenizer) -> int:
    return tokenizer.largest_id + 1


def compiler(tokenizer: Tokenizer, vocab_size: int | None = None) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size or num_ids(tokenizer), [eos_of(tokenizer)])


def matcher_of(made: GrammarCompiler, sampling: SamplingConfig) -> LLMatcher:
    grammar = made.compile(sampling)
    assert grammar is not None
    return grammar.matcher


def allowed(matcher: LLMatcher) -> set[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    assert not matcher.is_error(), matcher.get_error()
    return set(np.flatnonzero(bits).tolist())


def random_walk(
    matcher: LLMatcher, eos: int, rng: random.Random, watch: Callable[[list[int], set[int]], None]
) -> list[int] | None:
    """Token ids of one completion that ends by itself, each drawn evenly from the allowed ones; None after 400 tokens."""
    matcher, ids = matcher.deep_copy(), list[int]()
    for _ in range(400):
        tokens = allowed(matcher)
        watch(ids, tokens)
        token = rng.choice(sorted(tokens))
        assert matcher.consume_token(token)
        if token == eos:
            return ids
        ids.append(token)
    return None


def walks(tokenizer: Tokenizer, sampling: SamplingConfig, count: int, vocab_size: int | None = None) -> set[str]:
    """Texts of so many completions that end by themselves."""
    matcher = matcher_of(compiler(tokenizer, vocab_size), sampling)
    rng = random.Random(5)

    def watch(_: list[int], tokens: set[int]) -> None:
        assert max(tokens) < (vocab_size or num_ids(tokenizer))
        assert all(token == eos_of(tokenizer) or tokenizer.gives_text(token) for token in tokens)

    completions = (random_walk(matcher, eos_of(tokenizer), rng, watch) for _ in range(count))
    return {tokenizer.decode(ids) for ids in completions if ids is not None}


def test_choices_are_followed_token_by_token(tokenizer: Tokenizer) -> None:
    """A token is allowed exactly when the bytes with it begin a choice, and the end exactly when they are one."""
    eos = eos_of(tokenizer)
    pieces = load_ll_tokenizer(tokenizer, num_ids(tokenizer), [eos])
    strips = tokenizer.decode(pieces.greedy_tokenize(" a")) == "a"
    wanted = {choice.encode() for choice in CHOICES}
    # Where decoding drops a leading space, a text comes from itself behind one more space, or from itself if it has none.
    wanted = {b" " + text for text in wanted} | {text for text in wanted if not text.startswith(b" ")} if strips else wanted
    beginnings = {text[:end] for text in wanted for end in range(len(text) + 1)}
    bytes_of = {token: pieces.decode_bytes([token]) for token in range(num_ids(tokenizer)) if not pieces.is_special_token(token)}

    def watch(ids: list[int], tokens: set[int]) -> None:
        text = b"".join(bytes_of[token] for token in ids)
        expected = {token for token, piece in bytes_of.items() if text + piece in beginnings}
        assert tokens == expected | ({eos} if text in wanted else set())

    matcher = matcher_of(compiler(tokenizer), SamplingConfig(choice=CHOICES))
    rng = random.Random(1)
    completions = [random_walk(matcher, eos, rng, watch) for _ in range(300)]
    assert {tokenizer.decode(ids) for ids in completions if ids is not None} == set(CHOICES)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[A-Z][a-z]{1,4}( [a-z]{1,3}){0,2}\.",
        r"^(yes|no)$",
        r"a/b\n\"?c\\d",
        "a\nb",
        r"(?i)hello",
        r"\d{3}-\d{2}",
        r" ?x| y",
        r"[^a]{1,3}",
        r"</s>|<s>",
        r"\p{Greek}{2}é",
        "",
        r"(?x)a b # c",
    ],
)
def test_regexes_match_whole_texts(tokenizer: Tokenizer, pattern: str) -> None:
    texts = walks(tokenizer, SamplingConfig(regex=pattern), 12)
    assert texts
    same_in_python = pattern.replace(r"\p{Greek}", r"[\u0370-\u03ff\u1d00-\u1fff\u2126\uab65\U00010140-\U0001d245]")
    assert all(re.fullmatch(same_in_python, text) for text in texts), texts


def test_the_schemas_white_space_is_bounded(byte_level: Tokenizer) -> None:
    """Drawn evenly from what is allowed, every completion ends, as JSON with the schema's names in its order."""
    texts = walks(byte_level, SamplingConfig(json_schema=json.dumps(SCHEMA)), 40)
    for text in texts:
        value = json.loads(text)
        assert list(value) == ["name", "age", "tags", "pair"] and value["pair"] == {"x": "</s>"}
        assert len(value["name"]) <= 6 and 0 <= value["age"] <= 120 and isinstance(value["age"], int)
        assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"a", "b", None}
        assert not re.search(r"  |\n\n|\s{34}", re.sub(r"\n[ \t]*", "\n", text.replace(value["name"], "")))
    assert len(texts) > 30 and any("\n" in text for text in texts) and any(": " in text for text in texts)


def test_a_schema_may_decide_on_white_space_itself(byte_level: Tokenizer) -> None:
    compact = SCHEMA | {"x-guidance": {"whitespace_flexible": False}}
    for text in walks(byte_level, SamplingConfig(json_schema=json.dumps(compact)), 10):
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii="\\u" in text)


@pytest.mark.parametrize("vocab_size", [330, 1000, 300])
def test_vocabularies_of_model_and_tokenizer_may_differ(byte_level: Tokenizer, vocab_size: int) -> None:
    assert num_ids(byte_level) == 330
    for sampling in (SamplingConfig(regex="[^é]{1,9}"), SamplingConfig(choice=["</s>", "Hello world"])):
        assert walks(byte_level, sampling, 10, vocab_size)  # `walks` looks at every allowed token


def test_added_tokens_that_are_no_text_are_spelled_out(byte_level: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level.to_json())
    backend.add_special_tokens(["<|eot|>"])
    backend.add_tokens(["<tool>", "two words"])
    tokenizer = Tokenizer(backend, {"eos_token": "<|eot|>"})
    choices = ["<|eot|>", "<tool>", "two words", "</s>"]
    assert walks(tokenizer, SamplingConfig(choice=choices), 40) == set(choices)


def test_any_of_several_ends_may_come(byte_level: Tokenizer) -> None:
    assert allowed(matcher_of(GrammarCompiler(byte_level, 330, [0, 1, 999]), SamplingConfig(choice=[""]))) == {0, 1}


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"regex": "(a"}, "sampling.regex=(a: unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"\bfoo"}, "lookarounds not supported yet"),
        ({"regex": r"[^\s\S]"}, r"sampling.regex=[^\s\S]: no text can satisfy it"),
        ({"regex": "(" * 10_000}, "unclosed group"),
        ({"regex": "(" * 10_000 + ")" * 10_000}, "nest"),
        ({"regex": "a\udc80"}, "not valid Unicode"),
        ({"regex": "(?x)a # b\nc"}, "must be a single line"),
        ({"choice": ["a", "\ud800"]}, "not valid Unicode"),
        ({"json_schema": "{"}, "sampling.json_schema={: not JSON: "),
        ({"json_schema": "[1]"}, "must be a JSON object, not [1]"),
        ({"json_schema": '{"const": NaN}'}, "NaN is no number"),
        ({"json_schema": "[" * 100_000}, "recursion"),
        ({"json_schema": '{"items":' * 500 + "{}" + "}" * 500}, "recursion limit exceeded"),
        ({"json_schema": '{"type": "objct"}'}, "Invalid type: objct"),
        ({"json_schema": '{"type": "string", "pattern": "(a"}'}, "unclosed group"),
        ({"json_schema": '{"if": {}}'}, 'Unimplemented keys: ["if"]'),
        ({"json_schema": '{"enum": []}'}, "Unsatisfiable schema"),
        ({"json_schema": '{"allOf": [{"type": "string"}, {"type": "null"}]}'}, "Unsatisfiable schema: incompatible types"),
        ({"json_schema": '{"$ref": "#"}'}, "no text can satisfy it"),
        ({"json_schema": '{"$ref": "#/x"}'}, "Pointer '/x' does not exist"),
        ({"json_schema": '{"$ref": "http://example.com/x"}'}, "does not fetch"),
        ({"json_schema": '{"x-guidance": {"white": 1}}'}, "unknown field `white`"),
    ],
)
def test_refusals_name_field_value_and_reason(byte_level: Tokenizer, sampling: dict[str, Any], words: str) -> None:
    with pytest.raises(BadGrammar) as caught:
        compiler(byte_level).compile(SamplingConfig(**sampling))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert f"sampling.{next(iter(sampling))}=" in str(caught.value)


def test_a_checkpoint_must_be_able_to_follow(byte_level: Tokenizer) -> None:
    word_piece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    word_piece.decoder = tokenizers.decoders.WordPiece()
    for tokenizer, eos, words in (
        (None, [1], "has no tokenizer.json"),
        (byte_level, [], "end-of-sequence token, and this one has none"),
        (byte_level, [330], "end-of-sequence token, and this one has none"),
        (Tokenizer(word_piece, {}), [2], "do not work with the checkpoint's tokenizer.json: can't determine decoder"),
    ):
        made = GrammarCompiler(tokenizer, 400, eos)
        assert made.compile(SamplingConfig()) is None
        for _ in range(2):
            with pytest.raises(BadGrammar, match=words):
                made.compile(SamplingConfig(regex="a"))


def test_equal_grammars_are_compiled_once(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler(byte_level)
    first = made.compile(SamplingConfig(regex="a+"))
    assert made.compile(SamplingConfig(regex="a+", temperature=1.0)) is first
    assert made.compile(SamplingConfig(choice=["a+"])) is not first
    monkeypatch.setattr(byte_level, "to_json", None)  # the vocabulary is not read again
    for i in range(CACHED_GRAMMARS):
        made.compile(SamplingConfig(regex=f"a{i}"))
    assert made.compile(SamplingConfig(regex="a+")) is not first  # the least recently used are forgotten


def test_what_went_wrong_in_the_middle_is_one_line() -> None:
    assert reason("Parser Error: too many items\n<state>\nTokens") == "Parser Error: too many items"
    assert reason("NoExtensionBias\n<non-verbose/>") == "no text can satisfy it"
