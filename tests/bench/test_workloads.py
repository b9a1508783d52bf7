"""The named workloads are the same tokens everywhere; what a user brings is checked row by row."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.bench.workloads import NAMED, load_workloads, named_requests
from batchinfer.config import BenchConfig, ConfigError

# (requests, tokens in, tokens out, beginning of the sha256 over all of them as JSON): figures of several engines hang on these.
KNOWN = {
    "mixed": (1024, 558_503, 296_534, "8b7f5949e7ae0c28"),
    "shared": (1024, 1_192_389, 73_876, "9453c395d91ac76f"),
    "long_out": (256, 32_768, 262_144, "7b627372c40d6abb"),
    "single": (1, 128, 128, "1f8133adf0f2d902"),
}


def refusal(bench: BenchConfig, vocab_size: int = 32_000, max_model_len: int = 4096) -> str:
    with pytest.raises(ConfigError) as caught:
        load_workloads(bench, 0, vocab_size, max_model_len)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMED)
def test_named_workloads_never_change(name: str) -> None:
    requests = named_requests(name)
    digest = hashlib.sha256(json.dumps([[r.token_ids, r.max_tokens] for r in requests]).encode()).hexdigest()[:16]
    tokens_in, tokens_out = sum(len(r.token_ids) for r in requests), sum(r.max_tokens for r in requests)
    assert (len(requests), tokens_in, tokens_out, digest) == KNOWN[name]


def test_custom_has_the_lengths_that_were_asked_for() -> None:
    bench = BenchConfig(num_requests=50, input_len=[3, 9], output_len=4, shared_prefix_len=7)
    (workload,) = load_workloads(bench, 5, 100, 64)
    prompts = [request.token_ids for request in workload.requests]
    assert {len(prompt) for prompt in prompts} == set(range(10, 17))
    assert len({tuple(prompt[:7]) for prompt in prompts}) == 1 and len({tuple(prompt) for prompt in prompts}) == 50
    assert {request.max_tokens for request in workload.requests} == {4} and max(map(max, prompts)) < 100
    assert (workload.tokens_out, workload.longest) == (200, 20)
    assert load_workloads(bench, 5, 100, 64) == [workload] != load_workloads(bench, 6, 100, 64)


def test_several_workloads_in_the_order_asked() -> None:
    names = [workload.name for workload in load_workloads(BenchConfig(workload=["single", "custom"]), 0, 32_000, 4096)]
    assert names == ["single", "custom"]


def test_what_a_model_cannot_take() -> None:
    assert re.fullmatch(
        r"bench.workload=single: request 0 has the token id \d+, the model knows 0 to 4095; bench.workload=custom draws .*",
        refusal(BenchConfig(workload=["single"]), vocab_size=4096),
    )
    assert refusal(BenchConfig(workload=["single"]), max_model_len=255) == (
        "bench.workload=single: request 0 has 128 tokens and 128 to generate, more than model.max_model_len=255"
    )
    load_workloads(BenchConfig(workload=["single"]), 0, 32_000, 256)


def write(path: Path, **columns: Any) -> BenchConfig:
    pq.write_table(pa.table(columns), path)
    return BenchConfig(requests=str(path))


def test_a_file_brings_its_own_requests(tmp_path: Path) -> None:
    bench = write(tmp_path / "mine.parquet", max_tokens=[1, 5], other=["a", "b"], token_ids=[[1, 2], [3]])
    (workload,) = load_workloads(bench, 0, 10, 10)
    assert workload.name == "mine" and [(r.token_ids, r.max_tokens) for r in workload.requests] == [([1, 2], 1), ([3], 5)]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"token_ids": [[1]]}, "has no column max_tokens; it needs token_ids and max_tokens"),
        ({"token_ids": [1], "max_tokens": [1]}, "column token_ids holds int64; it must hold lists of integers"),
        (
            {"token_ids": [["a"]], "max_tokens": [1]},
            "column token_ids holds list<element: string>; it must hold lists",
        ),
        ({"token_ids": [[1]], "max_tokens": [1.5]}, "column max_tokens holds double; it must hold integers"),
        (
            {"token_ids": [[1], None], "max_tokens": [1, 1]},
            "row 1: token_ids must be a list of at least one token id",
        ),
        ({"token_ids": [[]], "max_tokens": [1]}, "column token_ids holds list<element: null>; it must hold lists of integers"),
        (
            {"token_ids": [[1], []], "max_tokens": [1, 1]},
            "row 1: token_ids must be a list of at least one token id",
        ),
        ({"token_ids": [[1, None]], "max_tokens": [1]}, "row 0: token_ids must be a list of at least one token id"),
        ({"token_ids": [[1]], "max_tokens": pa.array([None], pa.int32())}, "row 0: max_tokens must be at least 1, not null"),
        ({"token_ids": [[1]], "max_tokens": [0]}, "row 0: max_tokens must be at least 1, not 0"),
        ({"token_ids": [[1, 10]], "max_tokens": [1]}, "request 0 has the token id 10, the model knows 0 to 9"),
        ({"token_ids": [[1], [-1]], "max_tokens": [1, 1]}, "request 1 has the token id -1, the model knows 0 to 9"),
        (
            {"token_ids": [[1] * 8], "max_tokens": [3]},
            "request 0 has 8 tokens and 3 to generate, more than model",
        ),
        ({"token_ids": pa.array([], pa.list_(pa.int32())), "max_tokens": pa.array([], pa.int32())}, "holds no row"),
    ],
)
def test_mistakes_in_a_file_are_sentences(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    bench = write(tmp_path / "x.parquet", **columns)
    assert refusal(bench, 10, 10).startswith(f"bench.requests={tmp_path}/x.parquet: {said}")


def test_what_is_no_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    for name in ("text", "absent"):
        said = refusal(BenchConfig(requests=str(tmp_path / name)))
        assert said.startswith(f"bench.requests={tmp_path}/{name}: not a Parquet file that can be read (")
