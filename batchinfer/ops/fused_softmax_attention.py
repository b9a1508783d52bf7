"""Attention as it was first designed for this engine: Q K^T, one fused scale + causal mask + softmax, P V.

`paged_attention` gathers keys and values into pieces of bounded memory, as the reference does, and multiplies them with plain
matrix products. The scores of a piece exist in memory; the softmax passes over them once instead of three times. The backend
`engine.attention_backend=fused_softmax`; on a CPU, or in float64, the softmax is its twin in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer.ops.compiled import load_kernels
from batchinfer.ops.precision import accumulation_dtype
from batchinfer.ops.reference_attention import PieceGroup, group_pieces

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """`reference_attention.paged_attention`. Scores are float32 (float64 for float64), probabilities of q's element type."""
    groups = group_pieces(cu_seqlens_q, context_lens, block_tables, k_cache, q.shape[1], sliding_window)
    return attend(q, k_cache, v_cache, groups, scale, sliding_window)


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: Sequence[PieceGroup], scale: float, window: int | None) -> Tensor:
    """`paged_attention` of the batch and window that the groups were made for."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], k_cache, v_cache, group, scale, window)
    return out


def fused_softmax(scores: Tensor, scale: float, ends: Tensor | None, window: int | None, dtype: torch.dtype) -> Tensor:
    """Softmax over the last dimension of scale * scores [B, H, Q, L], each row over the columns that it sees, else 0.

    Row (b, h, q) sees the last `window` (None: all) of its first ends[b, q] columns; ends [B, Q] int32, None: the queries are
    the newest of L tokens. Rows that see nothing are 0, and what a row does not see never matters, not even NaN. Returns
    `dtype`, computed in float32 at least.
    """
    if not (scores.is_cuda and scores.dtype in _TYPES and dtype in (scores.dtype, *_TYPES[1:])):
        return _softmax(scores, scale, ends, window).to(dtype)
    load_kernels()
    probs = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    torch.ops.batchinfer.fused_softmax(probs, scores.contiguous(), scale, ends, window or 0)
    return probs


def _softmax(scores: Tensor, scale: float, ends: Tensor | None, window: int | None) -> Tensor:
    """The kernel's twin."""
    num_queries, length = scores.shape[2:]
    columns = torch.arange(length, device=scores.device)
    if ends is None:
        ends = torch.arange(length - num_queries + 1, length + 1, device=scores.device).unsqueeze(0)
    ends = ends.unsqueeze(1).unsqueeze(3)  # [B, 1, Q, 1]
    hidden = columns >= ends if window is None else (columns >= ends) | (columns < ends - window)
    wide = scores.to(accumulation_dtype(scores.dtype)) * scale
    return wide.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: PieceGroup, scale: float, window: int | None) -> Tensor:
    """Attention of a group's queries [n, Q, H, D], in that shape."""
    n, num_queries, num_heads, num_kv_heads = *q.shape[:3], k_cache.shape[2]
    ends = (group.positions - group.places[:, :1] + 1).int()  # [n, Q], counted from the first gathered key
    keys, values = _gather(k_cache, group.blocks), _gather(v_cache, group.blocks)  # [n * K, L, D]
    # Foreign keys make scores that no row sees; but foreign values are multiplied with 0, and 0 * NaN is NaN.
    values.view(n, num_kv_heads, *values.shape[1:]).masked_fill_(group.foreign[:, None, :, None], 0)
    # The query heads of one key-value head become further queries: grouped heads cost no copies of keys.
    heads_each = num_heads // num_kv_heads
    queries = q.unflatten(2, (num_kv_heads, heads_each)).permute(0, 2, 3, 1, 4)
    scores = _scores(queries.reshape(n * num_kv_heads, heads_each * num_queries, -1), keys)
    probs = fused_softmax(scores.view(n, num_heads, num_queries, -1), scale, ends, window, q.dtype)
    y = torch.bmm(probs.view(scores.shape), values)
    return y.view(n, num_kv_heads, heads_each, num_queries, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _gather(cache: Tensor, numbers: Tensor) -> Tensor:
    """Keys or values of blocks `numbers` [n, B], heads first as a matrix product wants them: [n * K, L, D]."""
    by_head = cache.transpose(1, 2)  # [blocks, K, block_size, D]
    heads = torch.arange(cache.shape[2], device=cache.device).view(1, -1, 1)
    if not by_head.is_contiguous():
        return by_head[numbers.unsqueeze(1), heads].flatten(2, 3).flatten(0, 1)
    rows = (numbers.unsqueeze(1) * cache.shape[2] + heads).flatten(1)  # [n, K * B] of blocks * K
    gathered = by_head.flatten(0, 1).index_select(0, rows.flatten())
    return gathered.view(len(numbers) * cache.shape[2], -1, cache.shape[3])


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [N, R, D] times keys [N, L, D]: [N, R, L], in the type that the softmax is computed in."""
    wide = accumulation_dtype(queries.dtype)
    if queries.dtype == wide:
        return torch.bmm(queries, keys.transpose(1, 2))
    if queries.is_cuda:
        return torch.bmm(queries, keys.transpose(1, 2), out_dtype=wide)
    return torch.bmm(queries.to(wide), keys.to(wide).transpose(1, 2))
