"""A checkpoint's tokenizer gives the ids and the text that transformers' AutoTokenizer gives, for each kind of checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from batchinfer.config import ConfigError
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.data.tokenizer_files import load_special_tokens
from tests.data.lookalikes import KINDS, llama_2

HYPOTHESIS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = [
    "<s>",
    "</s>",
    "<pad>",
    "<mask>",
    "<tool>",
    "[INST]",
    "<|eot_id|>",
    "<|im_end|>",
    "<think>",
    "<0x41>",
    "▁",
    " ",
    "\n",
    "it",
]
TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello",
    "  two  spaces ",
    "<s>[INST] what is it [/INST]",
    "<s> [INST] hi [/INST] it is </s><s>[INST] a",
    "Hello</s> world",
    "a <mask> b<pad><tool>c",
    "naïve 你好 🎉\r\n\n don't 12345",
    "e\u0301 is not \u00e9",
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids(ours: Tokenizer, oracle: Any, add_special_tokens: bool) -> None:
    expected = oracle(TEXTS, add_special_tokens=add_special_tokens)["input_ids"]
    assert ours.encode_batch(TEXTS, add_special_tokens) == expected


@HYPOTHESIS
@seed(0)
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join))
def test_ids_of_any_text(ours: Tokenizer, oracle: Any, text: str) -> None:
    assert ours.encode_batch([text], True) == [oracle(text)["input_ids"]]


@HYPOTHESIS
@seed(0)
@given(data=st.data())
def test_text_of_any_ids(ours: Tokenizer, oracle: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(oracle) + 3), max_size=30))
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    shown = [token_id for token_id in ids if ours.gives_text(token_id)]
    assert ours.decode(shown) == ours.decode(ids)


def test_names_and_numbers(folder: Path, ours: Tokenizer, oracle: Any) -> None:
    assert load_special_tokens(folder) == ours.special_tokens == oracle.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (oracle.bos_token_id, oracle.eos_token_id, len(oracle))


def test_the_kinds_differ(tmp_path: Path) -> None:
    def ids(name: str, text: str) -> list[int]:
        return Tokenizer.load(KINDS[name](tmp_path / name)).encode_batch([text], True)[0]

    behind_special = [ids(name, "<s>it") for name in ("llama 2", "llama 2, legacy", "mistral v1")]
    assert behind_special[0] != behind_special[1] == behind_special[2]
    leading_space = [ids(name, " Hello") for name in ("llama 2", "llama 2, legacy", "mistral v1")]
    assert leading_space[0] == leading_space[1] != leading_space[2]
    assert len(ids("llama 2", "<pad>")) > len(ids("llama 2, extra tokens", "<pad>")) == 2


def test_broken_files_are_named(tmp_path: Path) -> None:
    llama_2(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json' is not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json' must hold a JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": None}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json' is not JSON"):
        Tokenizer.load(tmp_path)
