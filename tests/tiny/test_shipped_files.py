"""The model and the sample that are shipped: small, loadable by others' readers, and what the rest of the tests may rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

TINY = Path(__file__).resolve().parents[2] / "batchinfer" / "tiny"
MODEL, SAMPLE = TINY / "model", TINY / "sample"
BOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sample() -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(SAMPLE.glob("*.parquet")))


def test_model_folder_is_complete_and_small() -> None:
    names = {p.name for p in MODEL.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(p.stat().st_size for p in MODEL.iterdir()) <= 8_000_000
    assert sum(p.stat().st_size for p in SAMPLE.iterdir()) <= 200_000


def test_config_agrees_with_tokenizer(tokenizer: Tokenizer) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["bos_token_id"] == tokenizer.token_to_id("<s>") == BOS
    assert config["eos_token_id"] == tokenizer.token_to_id("</s>")


@pytest.mark.parametrize("text", ["", "Return a list of", "a  b\n\tc", "na\u00efve \U0001f600 \u65e5\u672c"])
def test_tokenizer_adds_bos_once_and_loses_nothing(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids.count(BOS) == 1 and ids[0] == BOS
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids[1:]
    assert tokenizer.decode(ids) == text


def test_transformers_reads_the_tokenizer_as_we_do(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(MODEL)
    text = "Return a list of  names.\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<s>user: hi\n\nassistant:"
    assert theirs(chat, add_special_tokens=False)["input_ids"].count(BOS) == 1


def test_transformers_loads_every_weight(model: LlamaForCausalLM) -> None:
    _, report = LlamaForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert all(p.isfinite().all() for p in model.parameters())


def test_model_has_learnt_something(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """A model that knows nothing spends ln(4096) = 8.3 nats on a token."""
    ids = torch.tensor([tokenizer.encode("Return a list of the names of all the files in the directory.").ids])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 6


def test_sample_is_two_shards_of_distinct_rows(sample: pa.Table) -> None:
    assert sorted(p.name for p in SAMPLE.iterdir()) == ["part-0.parquet", "part-1.parquet"]
    assert len(sample) >= 200
    assert len(set(sample["id"].to_pylist())) == len(set(sample["prompt"].to_pylist())) == len(sample)


def test_sample_carries_columns_of_several_types(sample: pa.Table) -> None:
    assert sample.schema.field("id").type == pa.int64()
    assert pa.types.is_dictionary(sample.schema.field("source").type)
    assert pa.types.is_timestamp(sample.schema.field("created").type)
    assert pq.read_schema(SAMPLE / "part-0.parquet").equals(pq.read_schema(SAMPLE / "part-1.parquet"), check_metadata=False)


def test_prompts_fit_the_model(sample: pa.Table, tokenizer: Tokenizer) -> None:
    prompts = sample["prompt"].to_pylist()
    assert all(prompt.isascii() for prompt in prompts)
    lengths = [len(e.ids) for e in tokenizer.encode_batch(prompts)]
    assert min(lengths) >= 3 and max(lengths) <= 512
    assert len(set(lengths)) >= 10
