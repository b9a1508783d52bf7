"""Decode attention and the merging of partial results on a GPU, against the reference in float64. Caches hold NaN around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchinfer.ops.attention import DevicePlan, kernels_take, planned_attention
from batchinfer.ops.attention_plan import AttentionShape, PlanCapacity, plan_attention, with_tuning
from tests.ops.attention_cases import AttentionCase, make_case, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

RAGGED = [100, 1, 0, 17, 64, 300, 16, 15, 700, 33]
CLOSE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def shape_of(case: AttentionCase, multiprocessors: int = 4, **tuning: int) -> AttentionShape:
    made = AttentionShape(case.block_size, case.q.shape[1], case.k_cache.shape[2], multiprocessors, case.window)
    return with_tuning(made, **tuning)


def run(case: AttentionCase, capacity: PlanCapacity | None = None, **tuning: int) -> torch.Tensor:
    host = plan_attention(case.cu_seqlens_q, case.context_lens, case.block_tables, shape_of(case, **tuning), capacity)
    q, k, v, *indices = case.tensors("cuda")
    assert kernels_take(k, q.shape[1] // k.shape[2]) and kernels_take(v, 1)
    plan = DevicePlan.over(host, torch.from_numpy(host.buffer).cuda(), q.shape[1], q.shape[2])
    plan.partial_out.fill_(float("nan"))
    plan.partial_lse.fill_(float("nan"))
    torch.empty(q.shape, dtype=q.dtype, device="cuda").fill_(float("nan"))  # what `out` is likely to be made of
    return planned_attention(q, k, v, indices[0], plan, case.scale, case.window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (4, 2), (6, 2), (8, 2), (10, 2), (8, 1), (22, 2), (16, 1)])
def test_groups_of_heads(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    case = make_case(RAGGED, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, seed=heads)
    assert relative_error(run(case, min_piece=64), case.want()) < CLOSE[dtype]


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("window", [None, 1, 23, 5000])
@pytest.mark.parametrize("warps", [1, 3, 16])
def test_blocks_windows_and_warps(block_size: int, window: int | None, warps: int) -> None:
    case = make_case(RAGGED, heads=4, kv_heads=2, block_size=block_size, window=window, seed=warps)
    assert relative_error(run(case, warps=warps, min_piece=48, waves=2), case.want()) < CLOSE[torch.bfloat16]


@pytest.mark.parametrize("seed", range(8))
def test_random_batches_however_they_are_cut(seed: int) -> None:
    random = np.random.default_rng(seed)
    contexts = random.integers(0, random.choice([40, 400, 1500]), random.integers(1, 70)).tolist()
    case = make_case(contexts, heads=4, kv_heads=4 if seed % 2 else 1, seed=seed)
    want = case.want()
    for tuning in ({}, {"min_piece": 16, "waves": 50}, {"max_pack": 64, "waves": 1, "multiprocessors": 1}):
        y = run(case, warps=int(random.choice([1, 2, 4, 8, 16])), **tuning)
        assert relative_error(y, want) < CLOSE[torch.bfloat16]
        assert (y[np.array(contexts) == 0] == 0).all()


def test_large_scores_and_one_row_that_overflows() -> None:
    case = make_case(RAGGED, heads=4, kv_heads=2)
    case.q.mul_(40)
    clean = run(case, min_piece=64)
    assert relative_error(clean, case.want()) < 6e-3
    case.q[5] = float("inf")
    spoilt = run(case, min_piece=64)
    others = [i for i in range(len(RAGGED)) if i != 5]
    assert torch.equal(spoilt[others], clean[others])


def test_a_graph_replays_other_batches_of_its_capacity() -> None:
    cases = [make_case([*RAGGED[i:], *[0] * i], heads=8, kv_heads=2, seed=0) for i in range(3)]
    shape = shape_of(cases[0], min_piece=64)
    capacity = PlanCapacity.for_tokens(len(RAGGED), 1024, shape, tiles=False)
    plans = [plan_attention(c.cu_seqlens_q, c.context_lens, c.block_tables, shape, capacity) for c in cases]
    width = max(c.block_tables.shape[1] for c in cases)
    q, k, v, *_ = cases[0].tensors("cuda")
    tables = torch.zeros(len(RAGGED), width, dtype=torch.int32, device="cuda")
    plan = DevicePlan.over(plans[0], torch.from_numpy(plans[0].buffer).cuda(), 8, 128)
    graph, warm = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    arguments = (q, k, v, tables, plan, cases[0].scale, None)
    with torch.cuda.stream(warm):
        planned_attention(*arguments)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = planned_attention(*arguments)
    for case, host in zip(cases, plans, strict=True):
        other_q, other_k, other_v, other_tables, *_ = case.tensors("cuda")
        q.copy_(other_q)
        # Caches of the cases differ in size: the common blocks are those of the smaller.
        blocks = min(k.shape[0], other_k.shape[0])
        k[:blocks].copy_(other_k[:blocks])
        v[:blocks].copy_(other_v[:blocks])
        tables.zero_()
        tables[:, : other_tables.shape[1]].copy_(other_tables)
        plan.buffer.copy_(torch.from_numpy(host.buffer))
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, case.want()) < CLOSE[torch.bfloat16]
