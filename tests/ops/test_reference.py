"""The reference ops against loops that are too simple to be wrong, on odd shapes, strided views and padding."""

from __future__ import annotations

import math

import pytest
import torch

from batchinfer.ops import reference_attention, rms_norm, rope_and_cache, silu_and_mul
from batchinfer.ops.reference_attention import paged_attention


def _strided(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Random, and a slice of something larger, so never contiguous by luck."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return wide.to(dtype)[..., 1:-2]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_rms_norm(tokens):
    x, residual, weight = _strided(tokens, 13), _strided(tokens, 13, seed=1), _strided(13, seed=2)
    y, total = rms_norm(x, weight, 1e-3, residual)
    for i in range(tokens):
        row = [float(a + b) for a, b in zip(x[i], residual[i], strict=True)]
        root = math.sqrt(sum(value * value for value in row) / 13 + 1e-3)
        expected = torch.tensor([value / root * float(w) for value, w in zip(row, weight, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(y[i], expected, rtol=0, atol=1e-13)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(rms_norm(total, weight, 1e-3), y, rtol=0, atol=0)


def test_half_types_accumulate_in_float32():
    x = torch.full((1, 4096), 100.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert torch.equal(rms_norm(x, torch.ones(4096, dtype=torch.float16), 0.0), torch.ones_like(x))


def test_silu_and_mul():
    x = _strided(3, 10)
    y = silu_and_mul(x)
    for i in range(3):
        for j in range(5):
            gate, up = float(x[i, j]), float(x[i, j + 5])
            assert float(y[i, j]) == pytest.approx(gate / (1 + math.exp(-gate)) * up, abs=1e-14)


def test_rope_and_cache_turns_pairs_and_skips_padding():
    heads, kv_heads, dim, block_size = 3, 2, 6, 5
    q, k, v = _strided(4, heads, dim), _strided(4, kv_heads, dim, seed=1), _strided(4, kv_heads, dim, seed=2)
    angles = _strided(9, dim // 2, seed=3)
    both = torch.zeros(4, 2, block_size, kv_heads, dim, dtype=torch.float64)
    k_cache, v_cache = both[:, 0], both[:, 1]  # strided views
    positions, slots = torch.tensor([8, 0, 3, 5]), torch.tensor([19, -1, 0, 7], dtype=torch.int32)
    turned = rope_and_cache(q, k, v, torch.cat((angles.cos(), angles.sin()), -1), positions, k_cache, v_cache, slots)

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        pair = torch.complex(x[: dim // 2].contiguous(), x[dim // 2 :].contiguous())
        product = pair * torch.polar(torch.ones(dim // 2, dtype=torch.float64), angles[position])
        return torch.cat((product.real, product.imag))

    expected = torch.zeros_like(both)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        for h in range(heads):
            torch.testing.assert_close(turned[t, h], turn(q[t, h], position), rtol=0, atol=1e-13)
        for h in range(kv_heads if slot >= 0 else 0):
            expected[slot // block_size, 0, slot % block_size, h] = turn(k[t, h], position)
            expected[slot // block_size, 1, slot % block_size, h] = v[t, h]
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-13)


def _naive(q, k_cache, v_cache, tables, begins, contexts, scale, window):
    """One query head and one key at a time."""
    out, block_size, group = torch.zeros_like(q), k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for s, context in enumerate(contexts):
        for t in range(begins[s], begins[s + 1] if context else begins[s]):
            position = context - (begins[s + 1] - t)
            seen = [j for j in range(position + 1) if window is None or j > position - window]
            for h in range(q.shape[1]):
                keys = torch.stack([k_cache[tables[s, j // block_size], j % block_size, h // group] for j in seen])
                values = torch.stack([v_cache[tables[s, j // block_size], j % block_size, h // group] for j in seen])
                out[t, h] = (keys @ q[t, h] * scale).softmax(0) @ values
    return out


BATCHES = {
    "decode": ([1, 1, 1, 1], [1, 17, 4, 30]),
    "prefill": ([9, 1, 14], [9, 1, 14]),
    "mixed": ([1, 6, 1, 3, 1], [23, 6, 2, 27, 30]),
    "padded": ([2, 1, 1, 0], [5, 0, 11, 0]),
    "one": ([1], [1]),
}


@pytest.mark.parametrize("temporary_bytes", [2**28, 2000])
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("batch", BATCHES)
def test_paged_attention(monkeypatch, batch, heads, kv_heads, window, temporary_bytes):
    monkeypatch.setattr(reference_attention, "TEMPORARY_BYTES", temporary_bytes)
    counts, contexts = BATCHES[batch]
    begins = [0, *torch.tensor(counts).cumsum(0).tolist()]
    q, cache = _strided(begins[-1], heads, 10), _strided(2, 40, 4, kv_heads, 10, seed=1)
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(2)).int()[: 8 * len(counts)].view(len(counts), 8)
    tensors = (tables, torch.tensor(begins, dtype=torch.int32), torch.tensor(contexts, dtype=torch.int32))
    y = paged_attention(q, cache[0], cache[1], *tensors, scale=0.3, sliding_window=window)
    torch.testing.assert_close(y, _naive(q, cache[0], cache[1], tables, begins, contexts, 0.3, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 6])
def test_attention_reads_nothing_of_others(window):
    """NaN in every place that is not the sequence's own: in other blocks, also those that pad tables, and behind its end."""
    begins, contexts = torch.tensor([0, 1, 7, 8], dtype=torch.int32), torch.tensor([23, 6, 2], dtype=torch.int32)
    tables = torch.tensor([[9, 3, 8, 1, 12, 7], [2, 5, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]], dtype=torch.int32)
    q, cache = _strided(8, 4, 10), _strided(2, 13, 4, 2, 10, seed=1)
    y = paged_attention(q, cache[0], cache[1], tables, begins, contexts, 0.3, window)
    own = torch.zeros(13 * 4, dtype=torch.bool)
    for table, context in zip(tables, contexts.tolist(), strict=True):
        own[[int(table[j // 4]) * 4 + j % 4 for j in range(context)]] = True
    poisoned = cache.masked_fill(~own.view(13, 4, 1, 1), math.nan)
    assert torch.equal(paged_attention(q, poisoned[0], poisoned[1], tables, begins, contexts, 0.3, window), y)


def test_temporary_memory_is_bounded(monkeypatch):
    """Gathered keys and values never pass the limit, and rows of similar length still go together."""
    gathered = []
    gather = reference_attention._gather
    monkeypatch.setattr(reference_attention, "_gather", lambda *a: gathered.append(gather(*a)) or gathered[-1])
    monkeypatch.setattr(reference_attention, "TEMPORARY_BYTES", 2**20)
    contexts = torch.arange(1, 301, 5, dtype=torch.int32)
    num = len(contexts)
    cache = _strided(30, 16, 2, 16, dtype=torch.float32)
    tables = torch.arange(num * 19, dtype=torch.int32).remainder(30).view(num, 19)
    paged_attention(_strided(num, 4, 16, dtype=torch.float32), cache, cache, tables, torch.arange(num + 1), contexts, 0.25)
    assert max(2 * part.nbytes for part in gathered) <= 2**20
    assert len(gathered) // 2 <= 12
