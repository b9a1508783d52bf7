"""Paged attention by kernels: what `reference_attention.py` specifies, laid out by a plan of `attention_plan.py`.

Kernels take float16 and bfloat16, head dimensions 64 and 128, block sizes that are multiples of 16, up to 16 query heads to a
KV head, and caches whose memory is [blocks, K, block_size, D]. Everything else is left to the reference: ask `kernels_take`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.ops.attention_plan import AttentionPlan, PlanCounts, split_buffer
from batchinfer.ops.compiled import load_kernels

HEAD_DIMS, MAX_GROUP, TOKENS = (64, 128), 16, 16


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A plan where kernels read it, and room for partial results, which layers share."""

    counts: PlanCounts
    warps: int
    buffer: Tensor
    segments: Tensor
    part_indptr: Tensor
    tiles: Tensor
    tile_rows: Tensor
    combine_rows: Tensor
    combine_indptr: Tensor
    combine_slots: Tensor
    partial_out: Tensor  # [slots, H, D] float32
    partial_lse: Tensor  # [slots, H] float32

    @classmethod
    def over(cls, plan: AttentionPlan, flat: Tensor, num_heads: int, head_dim: int) -> DevicePlan:
        """The plan as it lies in `flat` on the device, where a copy of its buffer is, or will be when it is used."""
        out = torch.empty(plan.counts.slots, num_heads, head_dim, dtype=torch.float32, device=flat.device)
        lse = torch.empty(plan.counts.slots, num_heads, dtype=torch.float32, device=flat.device)
        arrays = split_buffer(flat, plan.counts)
        return cls(plan.counts, plan.warps, flat, **arrays, partial_out=out, partial_lse=lse)


def kernels_take(k_cache: Tensor, group: int) -> bool:
    """Whether there are kernels for a cache of this type and shape, with `group` query heads to a KV head."""
    block_size, _, head_dim = k_cache.shape[1:]
    dense = k_cache.stride(3) == 1 and k_cache.stride(1) == head_dim
    shapes = head_dim in HEAD_DIMS and block_size % TOKENS == 0 and group <= MAX_GROUP
    return k_cache.is_cuda and k_cache.dtype in (torch.float16, torch.bfloat16) and shapes and dense


def planned_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, plan: DevicePlan, scale: float, window: int | None
) -> Tensor:
    """As `reference.paged_attention` of the batch and window that the plan was made for. Rows of no sequence stay unwritten."""
    load_kernels()
    ops = torch.ops.batchinfer
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    caches, partial = (k_cache, v_cache, block_tables), (plan.partial_out, plan.partial_lse)
    if plan.counts.tiles:
        ops.tile_attention(q, *caches, plan.tiles, plan.tile_rows, out, *partial, scale, window or 0)
    if plan.counts.parts:
        ops.decode_attention(q, *caches, plan.segments, plan.part_indptr, out, *partial, scale, plan.warps)
    if plan.counts.combine_rows:
        ops.combine_attention(out, *partial, plan.combine_rows, plan.combine_indptr, plan.combine_slots)
    return out
