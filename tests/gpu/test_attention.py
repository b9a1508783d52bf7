"""Whole batches through the kernels of attention: prompts, chunks, decode rows, shared prefixes and padding together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchinfer.ops.attention import DevicePlan, planned_attention
from batchinfer.ops.attention_plan import AttentionShape, PlanCapacity, plan_attention, with_tuning
from batchinfer.ops.compiled import load_kernels
from tests.ops.attention_cases import AttentionCase, make_case, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

CLOSE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def need_tiles() -> None:
    load_kernels()
    if not hasattr(torch.ops.batchinfer, "tile_attention"):
        pytest.skip("the kernels have no tile_attention")


def run(case: AttentionCase, capacity: PlanCapacity | None = None, **tuning: int) -> tuple[torch.Tensor, DevicePlan]:
    shape = AttentionShape(case.block_size, case.q.shape[1], case.k_cache.shape[2], 132, case.window)
    host = plan_attention(case.cu_seqlens_q, case.context_lens, case.block_tables, with_tuning(shape, **tuning), capacity)
    q, k, v, *indices = case.tensors("cuda")
    plan = DevicePlan.over(host, torch.from_numpy(host.buffer).cuda(), q.shape[1], q.shape[2])
    plan.partial_out.fill_(float("nan"))
    plan.partial_lse.fill_(float("nan"))
    torch.empty(q.shape, dtype=q.dtype, device="cuda").fill_(float("nan"))
    return planned_attention(q, k, v, indices[0], plan, case.scale, case.window), plan


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (8, 2), (16, 1)])
@pytest.mark.parametrize("dim, dtype", [(128, torch.bfloat16), (64, torch.bfloat16), (128, torch.float16)])
def test_prompts_chunks_and_rows(dim: int, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None) -> None:
    contexts = [300, 129, 5, 0, 700, 64, 1, 1000, 17]
    counts = [300, 129, 2, 3, 100, 1, 1, 1, 16]
    case = make_case(contexts, counts, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, window=window, seed=heads)
    for tuning in ({}, {"min_tile_piece": 64, "min_piece": 64, "waves": 8}):
        assert relative_error(run(case, **tuning)[0], case.want()) < CLOSE[dtype]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2)])
def test_nested_prefixes(heads: int, kv_heads: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.ops.attention_plan._TWO_LAUNCHES", 0.0)
    random = np.random.default_rng(seed)
    rows = int(random.integers(2, 200))
    everyone, some, block_size = list(range(rows)), int(random.integers(1, 6)), 16
    inner = [(list(range(i, min(i + some, rows))), 20) for i in range(0, rows, some)]
    contexts = (random.integers(0, 300, rows) + 20 * block_size + 1).tolist()
    case = make_case(contexts, None, [*inner, (everyone, 12)], heads=heads, kv_heads=kv_heads, seed=seed)
    y, plan = run(case)
    assert plan.counts.tiles > 0
    assert relative_error(y, case.want()) < CLOSE[torch.bfloat16]
    shape = AttentionShape(block_size, heads, kv_heads, 132)
    assert relative_error(run(case, PlanCapacity.for_tokens(rows, 1000, shape))[0], case.want()) < CLOSE[torch.bfloat16]
