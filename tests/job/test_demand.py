"""What a sample of rows says of an input: lengths, samples, errors, and what all prompts begin with."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.compose import compose
from batchinfer.config import ConfigError
from batchinfer.data.prompts import PreparedRow
from batchinfer.engine.sequence import SamplingParams
from batchinfer.job.demand import Sampled, work_of
from batchinfer.job.plan import make_plan
from batchinfer.roofline import Work


def row(ids: list[int] | None, max_tokens: int = 5, samples: int = 1) -> PreparedRow:
    if ids is None:
        return PreparedRow(None, None, (), "null_prompt", "the prompt is null", 0)
    return PreparedRow(ids, SamplingParams(max_tokens=max_tokens), tuple(range(samples)), None, None, len(ids))


def test_lengths_of_rows_that_can_run() -> None:
    rows = [row([1, 2, 3, 9]), row(None), row([1, 2, 4], max_tokens=7)]
    assert work_of(rows, prefix_caching=True) == Work(2, (2, 1), (5, 7))
    assert work_of(rows, prefix_caching=False) == Work(0, (4, 3), (5, 7))
    assert work_of([row([1, 2, 3])], prefix_caching=True) == Work(0, (3,), (5,))
    assert work_of([row(None)], prefix_caching=True) == Work(0, (), ())


def test_further_samples_find_the_prompt_computed() -> None:
    rows = [row([1, 2, 3, 9], samples=3), row([5])]
    assert work_of(rows, prefix_caching=True) == Work(0, (4, 1, 1, 1), (5, 5, 5, 5))
    assert work_of(rows, prefix_caching=False) == Work(0, (4, 4, 4, 1), (5, 5, 5, 5))


def sampled(folder: Path, table: dict[str, list[object]], *words: str) -> Sampled:
    pq.write_table(pa.table(table), folder / "in.parquet")
    request = ["input=parquet", f"input.paths=[{folder}/in.parquet]", "output.token_ids=true", *words]
    plan = make_plan(compose(request, planning=True), sample=True)
    assert plan.sampled is not None
    return plan.sampled


def test_an_input_is_scaled_up_from_its_sample(tmp_path: Path) -> None:
    ids = [[7, 8, *([9] * (1 + i % 50))] for i in range(1000)]
    words = ["model=llama7b", "hw=h200x1", "input.token_ids_column=ids", "sampling.max_tokens=40", "sampling.n=2"]
    found = sampled(tmp_path, {"ids": ids}, *words)
    assert found.counted and 200 < found.rows <= 320
    assert found.prompt_tokens == pytest.approx(sum(map(len, ids)), rel=0.05)
    assert found.demand.sequences == 2000 and set(found.demand.sample.completions) == {40}
    assert found.demand.sample.prefix == 2, "all begin with 7 and 8, and one has a single token beyond"


def test_text_without_a_tokenizer_is_guessed_by_its_bytes(tmp_path: Path) -> None:
    words = ["model=llama7b", "hw=h200x1", "input.prompt_column=text", "sampling.max_tokens=5000"]
    found = sampled(tmp_path, {"text": ["x" * 400, "x" * 4000, "x" * 40_000]}, *words)
    work = found.demand.sample
    assert not found.counted and work.prefix == 0
    assert work.prompts[:2] == pytest.approx((100, 1000), rel=0.05) and work.prompts[2] == 4095  # cut to leave room for a token
    assert [p + c for p, c in zip(work.prompts, work.completions, strict=True)] == [4096] * 3


def test_rows_without_any_that_can_run_ask_for_nothing(tmp_path: Path) -> None:
    found = sampled(tmp_path, {"ids": [[99_999]] * 5}, "model=llama7b", "hw=h200x1", "input.token_ids_column=ids")
    assert found.demand.sequences == 0 and found.prompt_tokens == 0


def test_damaged_pages_are_a_sentence_that_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": [f"{i} " * 50 for i in range(5000)]}), file, compression="zstd")
    data = bytearray(file.read_bytes())
    data[100:2000] = bytes(1900)
    file.write_bytes(data)
    request = ["model=llama7b", "hw=h200x1", "input=parquet", f"input.paths=[{file}]", "input.prompt_column=text"]
    with pytest.raises(ConfigError, match=r"^input.paths: '.*in\.parquet': rows 0 to 39 cannot be read"):
        make_plan(compose(request, planning=True), sample=True)
