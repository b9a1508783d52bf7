"""Batches for tests of attention: ragged contexts, shared prefixes, and a cache that is NaN wherever nobody may look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.ops import reference


@dataclass
class AttentionCase:
    """A batch on the CPU, as `ops.paged_attention` takes it. `want()` is what the reference makes of it in float64."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: np.ndarray
    cu_seqlens_q: np.ndarray
    context_lens: np.ndarray
    scale: float
    window: int | None

    @property
    def block_size(self) -> int:
        return self.k_cache.shape[1]

    def tensors(self, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        indices = (torch.from_numpy(a).to(device) for a in (self.block_tables, self.cu_seqlens_q, self.context_lens))
        return (_on(self.q, device), _on(self.k_cache, device), _on(self.v_cache, device), *indices)

    def want(self) -> torch.Tensor:
        q, k, v, *indices = self.tensors()
        k, v = (torch.nan_to_num(cache.double(), nan=0.0) for cache in (k, v))
        return reference.paged_attention(q.double(), k, v, *indices, self.scale, self.window)


def _on(x: torch.Tensor, device: str) -> torch.Tensor:
    """With its strides."""
    return x if device == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def make_case(
    contexts: list[int],
    counts: list[int] | None = None,
    shared: list[tuple[list[int], int]] | None = None,
    *,
    heads: int = 2,
    kv_heads: int = 2,
    dim: int = 128,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    seed: int = 0,
) -> AttentionCase:
    """Sequences of `contexts` tokens with `counts` queries each (one). `shared`: (sequences, blocks that they begin with)."""
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    needed = [-(-context // block_size) for context in contexts]
    num_blocks = sum(needed) + 2
    tables = np.full((len(contexts), max(*needed, 1) + 1), 0, dtype=np.int32)
    ids = iter((random.permutation(num_blocks - 1) + 1).astype(np.int32))
    for table, count in zip(tables, needed, strict=True):
        table[:count] = [next(ids) for _ in range(count)]
    for sequences, blocks in shared or []:
        tables[sequences, :blocks] = tables[sequences[0], :blocks]
    theirs = np.zeros((num_blocks, block_size), dtype=bool)
    for table, context in zip(tables, contexts, strict=True):
        first = 0 if window is None else max(0, context - (max(counts) if counts else 1) + 1 - window)
        places = np.arange(first, context)
        theirs[table[places // block_size], places % block_size] = True
    cache = torch.randn(2, num_blocks, kv_heads, block_size, dim, generator=generator)
    cache = cache.masked_fill(~torch.from_numpy(theirs)[:, None, :, None], float("nan")).to(dtype)
    begins = np.concatenate(([0], np.cumsum(counts or [1] * len(contexts)))).astype(np.int32)
    q = torch.randn(int(begins[-1]), heads + 3, dim, generator=generator).to(dtype)[:, 2:-1]
    k_cache, v_cache = cache.transpose(2, 3).unbind(0)
    return AttentionCase(q, k_cache, v_cache, tables, begins, np.array(contexts, np.int32), dim**-0.5, window)


def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """NaN where anything is."""
    return float((y.double().cpu() - want).norm() / want.norm().clamp(min=1e-9))
