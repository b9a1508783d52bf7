"""Decoding bit by bit equals decoding at once, and stop strings are found wherever token borders fall."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from batchinfer.config import ConfigError
from batchinfer.data.tokenizer import IncrementalDecoder, StopChecker, Tokenizer
from tests.data.lookalikes import KINDS, TEXT

HYPOTHESIS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session", params=["byte_level_folder", "byte_fallback_folder"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.load(request.getfixturevalue(request.param))


@HYPOTHESIS
@given(data=st.data())
def test_text_so_far_is_the_decoded_text_without_its_broken_end(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=80))  # ids without a token too
    decoder = IncrementalDecoder(tokenizer)
    for i, token_id in enumerate(ids):
        assert decoder.add([token_id]) == tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")
    assert decoder.finish() == tokenizer.decode(ids)


def test_a_run_of_bytes_goes_on_behind_special_tokens(byte_fallback_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_fallback_folder)
    decoder, ids = IncrementalDecoder(tokenizer), [1, 1, 1, 1, 1, 1, 3, 1, 131]  # byte 0 and byte 128 with </s> between
    for token_id in ids:
        decoder.add([token_id])
    assert decoder.finish() == tokenizer.decode(ids)


@HYPOTHESIS
@given(text=st.text(max_size=60))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    for token_id in ids:
        shown = decoder.add([token_id])
        assert "\ufffd" not in shown or "\ufffd" in text
    assert decoder.finish() == tokenizer.decode(ids)


def test_cost_is_linear(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_batch(["Hello world. stop here, é " * 2000], add_special_tokens=False)[0]

    def seconds(count: int) -> float:
        decoder = IncrementalDecoder(tokenizer)
        started = time.perf_counter()
        for token_id in ids[:count]:
            decoder.add([token_id])
        return time.perf_counter() - started

    seconds(500)
    assert seconds(16_000) < 16 * seconds(2000) + 0.2  # 8 times the tokens; a quadratic cost would be 64 times


@HYPOTHESIS
@given(
    text=st.text("ab你é🎉 ", max_size=25),
    stop=st.lists(st.text("ab你é🎉 ", min_size=1, max_size=4), min_size=1, max_size=3),
    group=st.integers(1, 4),
)
def test_stop_strings_are_found_where_they_first_stand(tokenizer: Tokenizer, text: str, stop: list[str], group: int) -> None:
    ids = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    checker = StopChecker(tuple(stop), IncrementalDecoder(tokenizer), 0)
    outcome = next((t for i in range(0, len(ids), group) if (t := checker.push(ids[i : i + group])) is not None), None)
    expected = None
    for i in range(len(ids)):  # the slow twin: the whole text again after every token
        so_far = tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")
        starts = [so_far.find(s) for s in stop if s in so_far]
        if starts:
            expected = so_far[: min(starts)]
            break
    assert outcome == expected


def first_stop(tokenizer: Tokenizer, ids: list[int], stop: list[str], min_tokens: int) -> str | None:
    """The slow twin: after every token the whole text again. A match must end behind the text of the first `min_tokens`."""
    floor = 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        if count <= min_tokens:
            floor = max(floor, len(text))
            continue
        starts = [i for s in stop for i in range(len(text)) if text.startswith(s, i) and i + len(s) > floor]
        if starts:
            return text[: min(starts)]
    return None


@pytest.fixture(
    scope="module", params=["llama 2", "llama 2, legacy", "mistral v3", "llama 3", "qwen 3", "llama 2, no prefix space"]
)
def real_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(KINDS[request.param](tmp_path_factory.mktemp("checkpoint")))


@settings(HYPOTHESIS, max_examples=150)
@seed(0)
@given(data=st.data())
def test_stop_strings_in_any_ids(real_kind: Tokenizer, data: st.DataObject) -> None:
    words = real_kind.encode_batch(["it is é 你好 🎉 \ufffd\n", "<s></s>"], add_special_tokens=False)
    token = st.integers(0, real_kind.vocab_size + 2) | st.sampled_from([token for ids in words for token in ids])
    ids = data.draw(st.lists(token, max_size=40))
    text = real_kind.decode(ids)
    within = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 5)).map(lambda s: text[s[0] : s[0] + s[1]])
    stop = data.draw(st.lists((within | st.text("itsé你 \n\ufffd", max_size=3)).filter(bool), max_size=3))
    min_tokens = data.draw(st.integers(0, 12))
    checker = StopChecker(tuple(stop), IncrementalDecoder(real_kind), min_tokens)
    outcome, rest = None, ids
    while rest and outcome is None:
        size = data.draw(st.integers(1, 4))
        outcome, rest = checker.push(rest[:size]), rest[size:]
    assert outcome == first_stop(real_kind, ids, stop, min_tokens)


@settings(HYPOTHESIS, max_examples=100)
@seed(0)
@given(data=st.data())
def test_text_of_any_ids_bit_by_bit(real_kind: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, real_kind.vocab_size + 2), max_size=80))
    decoder = IncrementalDecoder(real_kind)
    for count, token_id in enumerate(ids, 1):
        assert decoder.add([token_id]) == real_kind.decode(ids[:count]).rstrip("\ufffd")
        assert real_kind.decode(ids).startswith(real_kind.decode(ids[:count])[: decoder.settled_length])
    assert decoder.finish() == real_kind.decode(ids)


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaa"), (4, None)])
def test_min_tokens_shields_matches_that_end_in_them(tokenizer: Tokenizer, min_tokens: int, expected: str | None) -> None:
    ids = [tokenizer.encode_batch(["o"], add_special_tokens=False)[0][-1]] * 4
    checker = StopChecker(("o",), IncrementalDecoder(tokenizer), min_tokens)
    assert checker.push(ids) == (None if expected is None else expected.replace("a", "o"))


def test_a_match_may_begin_in_the_first_tokens(tokenizer: Tokenizer) -> None:
    o = tokenizer.encode_batch(["o"], add_special_tokens=False)[0][-1]
    assert StopChecker(("oo",), IncrementalDecoder(tokenizer), 2).push([o, o]) is None
    assert StopChecker(("oo",), IncrementalDecoder(tokenizer), 2).push([o, o, o]) == "o"


def test_text_that_is_taken_back_for_a_moment_still_shields(byte_fallback_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_fallback_folder)
    ids = [3 + byte for byte in "A你".encode()]  # A is no text again while the run of bytes behind it is incomplete
    assert StopChecker(("A",), IncrementalDecoder(tokenizer), 2).push(ids) is None
    assert StopChecker(("A",), IncrementalDecoder(tokenizer), 0).push(ids) == ""


def test_no_half_character_is_shown(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    ids = tokenizer.encode_batch(["𝄞"], add_special_tokens=False)[0]
    assert len(ids) == 4
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.add([token_id]) for token_id in ids] == ["", "", "", "𝄞"]


def test_special_tokens(byte_level_folder: Path, byte_fallback_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (0, 1, [1])
    (plain,) = tokenizer.encode_batch(["Hello"], add_special_tokens=False)
    assert tokenizer.encode_batch(["Hello"], add_special_tokens=True) == [[0, *plain]]
    assert tokenizer.decode([0, *plain, 1]) == "Hello"
    without = Tokenizer.load(byte_fallback_folder)  # a bos exists, but this post-processor adds none
    assert without.encode_batch(["Hello"], True) == without.encode_batch(["Hello"], False)


def test_decoding_in_batches(tokenizer: Tokenizer) -> None:
    many = [[], [5], [1, 2, 3, 300, 5000], list(range(tokenizer.vocab_size))]
    assert tokenizer.decode_batch(many) == [tokenizer.decode(ids) for ids in many]
    assert tokenizer.decode_batch([]) == []


def test_the_largest_id(byte_level_folder: Path, byte_fallback_folder: Path) -> None:
    assert Tokenizer.load(byte_level_folder).largest_id == 329
    raw = json.loads((byte_fallback_folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["far"] = 70_000
    assert Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(raw)), {}).largest_id == 70_000


def test_spaces_are_not_cleaned_up(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    text = " it 's  so , \n don 't ! "
    assert tokenizer.decode(tokenizer.encode_batch([text], True)[0]) == text


def test_special_tokens_may_be_objects_and_truncation_is_switched_off(byte_level_folder: Path, tmp_path: Path) -> None:
    raw = json.loads((byte_level_folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 1)
    assert len(tokenizer.encode_batch(["one two three four"], True)[0]) > 2


def test_missing_tokenizers_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"convert it once.*sentencepiece and protobuf.*backend_tokenizer\.save"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_conversion_that_is_named_works(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from transformers import AutoTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(tmp_path)
    exec(f"from transformers import AutoTokenizer; {str(caught.value).partition('installed: ')[2]}")
    assert Tokenizer.load(tmp_path).encode_batch(TEXT, True) == expected
