"""The floor against sums done by hand, and against the figures that were published for one H200."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchinfer import compose
from batchinfer.bench.floor import Floor, floor, gemm_seconds, work_of
from batchinfer.bench.workloads import BenchRequest, named_requests
from batchinfer.model.config import ModelShape
from batchinfer.roofline import Ceilings, Cost, Work, common_prefix

# Measured on one H200 over Llama-2-7B shapes, all-reduces on two of them.
H200 = Ceilings(
    read=4.22e12,
    copy=4.29e12,
    gemm=(
        (1, 3.3e12),
        (16, 51.8e12),
        (64, 205e12),
        (256, 639e12),
        (512, 739e12),
        (1024, 777e12),
        (2048, 792e12),
    ),
    attention=550e12,
    all_reduce=(
        (8192, 6.1e-6),
        (131072, 7.4e-6),
        (524288, 7.9e-6),
        (2 << 20, 13e-6),
        (8 << 20, 32e-6),
        (32 << 20, 108e-6),
    ),
)
# A device and a model of round numbers: a token costs 2 s of GEMM, a read of the weights 1 s, a key 10 s, a pair 100 s.
ROUND = Ceilings(read=1.0, copy=1.0, gemm=((1, 1.0), (4, 2.0)), attention=1.0)
SMALL = Cost(layer_params=2.0, head_params=0.0, param_bytes=0, kv_bytes=10, attention_ops=100, hidden_bytes=1, all_reduces=0)


def shape(name: str) -> ModelShape:
    return ModelShape.from_hf(compose.compose([f"model={name}"], planning=True).model.architecture)


def h200_floor(name: str, workload: str, ranks: int) -> Floor:
    model = shape(name)
    memory = 139.8 * 0.9 * 2**30 * ranks - 2 * model.num_parameters()
    kv_tokens = int(memory / model.kv_bytes_per_token("bfloat16"))
    return floor(work_of(named_requests(workload)), Cost.of(model, "bfloat16", ranks), H200, kv_tokens)


@pytest.mark.parametrize(
    ("name", "workload", "ranks", "sequential", "library", "overlapped"),
    [
        ("llama7b", "mixed", 1, 41.6, 42.7, 30.2),
        ("llama7b", "shared", 1, 5.6, 5.7, 4.0),
        ("llama7b", "long_out", 1, 25.8, 26.8, 21.4),
        ("llama7b", "single", 1, 0.404, 0.516, 0.401),
        ("llama7b", "mixed", 2, 22.4, 22.7, 14.8),
        ("llama7b", "single", 2, 0.252, 0.308, 0.20),
        ("llama13b", "mixed", 2, 37.9, 38.7, 24.8),
        ("llama13b", "long_out", 2, 22.4, 23.4, 16.8),
        ("llama13b", "single", 2, 0.455, 0.565, 0.39),
    ],
)
def test_published_floors_of_h200s(
    name: str, workload: str, ranks: int, sequential: float, library: float, overlapped: float
) -> None:
    found = h200_floor(name, workload, ranks)
    assert found.sequential_s == pytest.approx(sequential, rel=0.012)
    assert found.library_s == pytest.approx(library, rel=0.012)
    assert found.overlapped_s == pytest.approx(overlapped, rel=0.012)


def test_where_the_time_of_a_mixed_batch_goes() -> None:
    found = h200_floor("llama7b", "mixed", 1)
    assert (round(found.attention_s, 1), round(found.gemm_s, 1)) == (26.7, 14.9)
    assert h200_floor("llama7b", "single", 1).first_token_s == pytest.approx(3.1e-3, rel=0.02)


def test_one_request_by_hand() -> None:
    """Two tokens in, three out. Pairs: 1 + 2. Keys read by the two decode steps: 3 and 4."""
    found = floor(Work(0, (2,), (3,)), SMALL, ROUND, kv_tokens=100)
    gemm, attention = 2 * 2 * (2 + 1 + 1) / 2.0, 100 * 3 + 10 * (3 + 4)
    assert (found.gemm_s, found.attention_s, found.steps) == (gemm, attention, 3)
    assert found.sequential_s == gemm + attention and found.first_token_s == 4 + 300
    assert found.overlapped_s == 300 + 30 + 40
    assert found.library_s == pytest.approx(2 * 2 * (2 / (4 / 3) + 1 + 1) + attention)


def test_a_full_cache_makes_requests_wait() -> None:
    """Four tokens and half of two that come hold five places: with nine the second waits until the first has gone."""
    work = Work(0, (4, 4), (2, 2))
    assert floor(work, SMALL, ROUND, kv_tokens=10).steps == 2
    assert floor(work, SMALL, ROUND, kv_tokens=8).steps == 4
    assert floor(work, SMALL, ROUND, kv_tokens=1).steps == 4  # one always runs


def test_what_all_have_in_common_is_computed_once_and_read_once_a_step() -> None:
    alike = [BenchRequest([1, 2, 3, own], 2) for own in (7, 8, 9)]
    work = work_of(alike)
    assert work == Work(3, (1, 1, 1), (2, 2, 2))
    found = floor(work, SMALL, ROUND, kv_tokens=100)
    prefill = 100 * (1 + 2 + 3) + 3 * 100 * 4
    assert found.attention_s == prefill + 10 * (3 + 3 * 2) and found.gemm_s == 2 * 2 * (3 + 3 + 3) / 2.0


def test_the_common_prefix_leaves_everyone_a_token() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 1
    assert common_prefix([[1, 2], [1, 2]]) == 1
    assert common_prefix([[1], [2]]) == 0
    assert work_of([BenchRequest([5, 6], 1)]) == Work(0, (2,), (1,))


def test_a_gemm_takes_its_operations_or_its_weights() -> None:
    cost = replace(SMALL, head_params=1.0, param_bytes=10)
    assert gemm_seconds(cost, ROUND, 1, 0) == (20, 20)  # reading 2 parameters of 10 bytes
    assert gemm_seconds(cost, ROUND, 1, 1) == (30, 30)
    assert gemm_seconds(cost, ROUND, 100, 0) == (200, 200)  # 400 operations at 2 a second
    assert gemm_seconds(SMALL, ROUND, 1, 0) == (2, 4)  # the library reaches half of its best with one row


def test_windows_bound_what_is_read() -> None:
    cost = replace(SMALL, window=3, windowed_share=0.5)
    assert list(cost.keys_seen(np.array([1, 3, 5]))) == [1, 3, 4]
    assert cost.prefill_ops(2, before=4) == 100 * (4 + 4.5)
    all_windowed = replace(SMALL, window=3, windowed_share=1.0)
    found = floor(Work(8, (1, 1), (2, 2)), all_windowed, ROUND, kv_tokens=100)
    assert found.attention_s - 100 * (1 + 2 + 6 * 3) - 2 * 100 * 3 == 10 * (3 + 2)  # a key of the prefix, once; 2 own of each


def test_all_reduces_cost_by_their_bytes() -> None:
    table = replace(ROUND, all_reduce=((10, 1.0), (20, 2.0)))
    assert [table.all_reduce_seconds(n) for n in (1, 15, 40)] == [1.0, 1.5, 4.0]
    cost = replace(SMALL, hidden_bytes=10, all_reduces=2)
    assert floor(Work(0, (1,), (2,)), cost, table, 10).all_reduce_s == 2 * 2 * 1.0
    assert ROUND.all_reduce_seconds(10) == 0


def test_costs_are_those_of_the_shape() -> None:
    model = shape("llama3_8b")
    cost = Cost.of(model, "bfloat16")
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert cost.layer_params + 2 * cost.head_params + norms == model.num_parameters()
    assert cost.kv_bytes == 2 * 32 * 8 * 128 * 2 and cost.attention_ops == 4 * 32 * 128 * 32 and cost.all_reduces == 0
    half = Cost.of(model, "bfloat16", 2)
    assert half.layer_params * 2 == cost.layer_params and half.kv_bytes * 2 == cost.kv_bytes and half.all_reduces == 64
    assert Cost.of(shape("mistral7b"), "bfloat16").windowed_share == 1.0 and cost.windowed_share == 0.0
