"""The memory-bound kernels against the reference: odd shapes, strided views, padding, many seeds, poisoned outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from batchinfer.ops import elementwise, reference
from batchinfer.ops.compiled import load_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every output that an op allocates begins as NaN."""
    empty = torch.empty

    def filled(*args: int, **options: object) -> Tensor:
        made = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(math.nan if made.is_floating_point() else -7)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "empty", filled)
    load_kernels()
    yield


def random(*shape: int, dtype: torch.dtype, seed: int = 0, pad: int = 0, offset: int = 0) -> Tensor:
    """A view of rows that are `pad` elements apart, the first beginning `offset` elements into its memory."""
    made = torch.randn(*shape[:-1], shape[-1] + pad, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).cuda()[..., offset : offset + shape[-1]]


def assert_near(ours: Tensor, exact: Tensor) -> None:
    """Within a rounding or two of what float64 gives."""
    assert ours.shape == exact.shape
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact.double(), rtol=max(eps, 4e-6), atol=max(eps * 1e-3, 1e-6))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 128, 264, 1000, 4096, 4100, 11008, 16384])
@pytest.mark.parametrize(("pad", "offset"), [(0, 0), (16, 8), (3, 1)])
def test_rms_norm(dtype: torch.dtype, size: int, pad: int, offset: int) -> None:
    for rows in (0, 1, 133):
        x = random(rows, size, dtype=dtype, seed=rows, pad=pad, offset=offset)
        residual = random(rows, size, dtype=dtype, seed=rows + 1, pad=2 * pad, offset=offset)
        weight = random(size, dtype=dtype, seed=2)
        assert_near(elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
        kept = residual.clone()
        y, total = elementwise.rms_norm(x, weight, 1e-5, residual)
        assert torch.equal(total, x + residual) and torch.equal(residual, kept)
        assert_near(y, reference.rms_norm(total.double(), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 80, 6])
def test_rms_norm_of_the_heads_of_a_strided_view(dtype: torch.dtype, dim: int) -> None:
    qkv = random(37, 12 * dim, dtype=dtype, pad=8)
    weight = random(dim, dtype=dtype, seed=1)
    for first, heads in ((0, 8), (8, 2)):
        x = qkv[:, first * dim : (first + heads) * dim].unflatten(1, (heads, dim))
        y = elementwise.rms_norm(x, weight, 1e-6)
        assert y.is_contiguous()
        assert_near(y, reference.rms_norm(x.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_normed_alike_in_every_batch(dtype: torch.dtype) -> None:
    x, residual = random(300, 4096, dtype=dtype), random(300, 4096, dtype=dtype, seed=1)
    weight = random(4096, dtype=dtype, seed=2)
    whole = elementwise.rms_norm(x, weight, 1e-5, residual)[0]
    for rows in (1, 2, 17):
        assert torch.equal(elementwise.rms_norm(x[:rows], weight, 1e-5, residual[:rows])[0], whole[:rows])


@pytest.mark.parametrize("size", [100, 128, 4096])
def test_the_sum_may_overwrite_either_of_its_terms(size: int) -> None:
    weight = random(size, dtype=torch.bfloat16, seed=2)
    for overwritten in (0, 1):
        terms = [random(9, size, dtype=torch.bfloat16, seed=seed) for seed in (0, 1)]
        y, total = elementwise.rms_norm(terms[0], weight, 1e-5, terms[1])
        out = torch.empty(9, size, dtype=torch.bfloat16, device="cuda")
        torch.ops.batchinfer.rms_norm(out, terms[0], weight, 1e-5, terms[1], terms[overwritten])
        assert torch.equal(out, y) and torch.equal(terms[overwritten], total)


def caches(dtype: torch.dtype, kv_heads: int, dim: int, heads_first: bool) -> tuple[Tensor, Tensor]:
    """Of 11 blocks of 5 places, all NaN."""
    shape = (2, 11, kv_heads, 5, dim) if heads_first else (2, 11, 5, kv_heads, dim)
    both = torch.full(shape, math.nan, dtype=dtype, device="cuda")
    keys, values = both.transpose(2, 3) if heads_first else both
    return keys, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 80, 6, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (32, 8)])
@pytest.mark.parametrize("heads_first", [True, False])
def test_rope_and_cache(dtype: torch.dtype, dim: int, heads: int, kv_heads: int, heads_first: bool) -> None:
    for seed, tokens in enumerate((0, 1, 55, 130)):
        rng = torch.Generator().manual_seed(seed)
        qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=seed, pad=8 * (seed % 2))
        q, k, v = (part.unflatten(1, (-1, dim)) for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
        angles = torch.randn(200, dim // 2, generator=rng).double()
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1).float().cuda()
        positions = torch.randint(200, (tokens,), generator=rng).int().cuda()
        slots = torch.cat((torch.randperm(55, generator=rng).int(), torch.full((75,), -1).int()))[:tokens]
        slots = slots[torch.randperm(tokens, generator=rng)].cuda()
        ours, theirs = caches(dtype, kv_heads, dim, heads_first), caches(dtype, kv_heads, dim, heads_first)
        turned = elementwise.rope_and_cache(q, k, v, cos_sin, positions, *ours, slots)
        expected = reference.rope_and_cache(q, k, v, cos_sin, positions, *theirs, slots)
        assert turned.is_contiguous() and torch.equal(turned, expected)
        assert same(ours[0], theirs[0]) and same(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_takes_any_alignment_and_index_type(dtype: torch.dtype) -> None:
    q, k, v = (random(9, heads, 64, dtype=dtype, pad=3, offset=1) for heads in (4, 2, 2))
    cos_sin, positions = random(20, 64, dtype=torch.float32), torch.arange(9).cuda()
    ours, theirs = caches(dtype, 2, 64, True), caches(dtype, 2, 64, True)
    turned = elementwise.rope_and_cache(q, k, v, cos_sin, positions, *ours, positions)
    assert torch.equal(turned, reference.rope_and_cache(q, k, v, cos_sin, positions, *theirs, positions))
    assert same(ours[0], theirs[0]) and same(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 100, 688, 11008])
@pytest.mark.parametrize(("pad", "offset"), [(0, 0), (16, 8), (3, 1)])
def test_silu_and_mul(dtype: torch.dtype, size: int, pad: int, offset: int) -> None:
    for rows in (0, 1, 67):
        x = 4 * random(rows, 2 * size, dtype=dtype, seed=rows, pad=pad, offset=offset)
        assert_near(elementwise.silu_and_mul(x), reference.silu_and_mul(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -100, -88, -20, -0.0, 0.0, 20, 100, 1e4, math.inf, math.nan], dtype=dtype)
    x = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0).cuda()
    torch.testing.assert_close(elementwise.silu_and_mul(x), reference.silu_and_mul(x), equal_nan=True, rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [1, 12, 100, 4096, 5120])
def test_embedding(dtype: torch.dtype, size: int) -> None:
    weight = random(50, size, dtype=dtype, pad=8)
    for rows in (0, 1, 40):
        ids = torch.randint(200, (rows,), generator=torch.Generator().manual_seed(rows)).int().cuda()
        for start, stop in ((0, None), (70, None), (70, 113)):
            assert torch.equal(elementwise.embedding(ids, weight, start, stop), reference.embedding(ids, weight, start, stop))


@pytest.mark.parametrize("tokens", [0, 1, 127, 700])
def test_fed_tokens_are_resolved_and_stored(tokens: int) -> None:
    rng = torch.Generator().manual_seed(tokens)
    last = torch.randint(32_000, (512,), generator=rng).int().cuda()
    ids = torch.randint(-512, 32_000, (tokens,), generator=rng).int()
    ids = torch.where(torch.rand(tokens, generator=rng) < 0.5, ids, -1 - ids.remainder(512)).cuda()
    slots = torch.randperm(900, generator=rng)[:tokens].int().cuda()
    slots[::5] = -1
    ours, theirs = torch.full((2, 901), -9, dtype=torch.int32, device="cuda")
    resolved = elementwise.feed_tokens(ids, last, slots, ours)
    assert torch.equal(resolved, reference.feed_tokens(ids, last, slots, theirs))
    assert torch.equal(ours[:-1], theirs[:-1]) and int(ours[-1]) == -9


def test_a_layer_in_a_graph() -> None:
    """Captured once, replayed with other contents of the same tensors."""
    x, residual = random(3, 512, dtype=torch.bfloat16), random(3, 512, dtype=torch.bfloat16, seed=1)
    weight, table = random(512, dtype=torch.bfloat16, seed=2), random(20, 512, dtype=torch.bfloat16, seed=3)
    cos_sin, ids = random(30, 64, dtype=torch.float32), torch.tensor([3, -2, 5], dtype=torch.int32).cuda()
    last, cache = torch.tensor([1, 2, 4], dtype=torch.int32).cuda(), torch.zeros(56, dtype=torch.int32).cuda()
    positions, slots = torch.tensor([7, 0, 29], dtype=torch.int32).cuda(), torch.tensor([54, -1, 0], dtype=torch.int32).cuda()
    keys, values = caches(torch.bfloat16, 2, 64, True)

    def layer(ops: object) -> Tensor:
        rows = ops.embedding(ops.feed_tokens(ids, last, slots, cache), table)  # type: ignore[attr-defined]
        y, total = ops.rms_norm(x + rows, weight, 1e-5, residual)  # type: ignore[attr-defined]
        q, k, v = y.unflatten(1, (8, 64)).split([4, 2, 2], 1)
        q = ops.rope_and_cache(q, k, v, cos_sin, positions, keys, values, slots)  # type: ignore[attr-defined]
        return ops.silu_and_mul(q.flatten(1) + total[:, :256])  # type: ignore[attr-defined, no-any-return]

    layer(elementwise)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(elementwise)
    for seed in range(3):
        x.copy_(random(3, 512, dtype=torch.bfloat16, seed=seed + 10))
        residual.copy_(random(3, 512, dtype=torch.bfloat16, seed=seed + 20))
        last.add_(1)
        positions.copy_(positions.roll(1))
        graph.replay()
        stored = keys.clone(), values.clone()
        expected = layer(reference)
        torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03)
        torch.testing.assert_close(stored[0], keys, rtol=0.03, atol=0.03, equal_nan=True)
        torch.testing.assert_close(stored[1], values, rtol=0.03, atol=0.03, equal_nan=True)
