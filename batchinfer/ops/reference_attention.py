"""Attention of a flat batch over the paged KV cache, in plain torch.

Sequences are cut into pieces of bounded work, pieces of similar size are padded to a common shape, and each such group is
gathered from its blocks and computed at once. So decode rows need no loop of their own, and temporary memory stays bounded.
Where to gather is worked out once for a step (`group_pieces`), and then serves every layer (`attend`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TEMPORARY_BYTES = 256 * 2**20  # of gathered keys and values, and again of scores

# Not cuDNN: it plans anew for every shape, and every step has other shapes.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive queries of one sequence and the blocks that hold every key they may see."""

    sequence: int
    query: int  # index of its first query in the flat batch
    num_queries: int
    position: int  # of its first query in the sequence
    block: int  # first entry of the block table it reads
    num_blocks: int


@dataclass(frozen=True, slots=True, eq=False)
class PieceGroup:
    """n pieces that are computed at once, padded to Q queries over the L keys of B blocks: index tensors on the device."""

    rows: Tensor  # [n, Q] queries of the flat batch; a short piece repeats its last one, so that nothing needs masking
    positions: Tensor  # [n, Q] of these queries in their sequences
    blocks: Tensor  # [n, B] of the cache
    places: Tensor  # [n, L] positions of the keys in their sequences
    foreign: Tensor  # [n, L] keys beyond a piece's newest query: of another sequence, or of one that was here before


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
    """Causal attention of q [T, H, D] over the caches [blocks, block_size, K, D]. Returns [T, H, D].

    Sequence s owns queries cu_seqlens_q[s] to cu_seqlens_q[s + 1], the newest of its context_lens[s] tokens, whose keys
    lie in the blocks that block_tables[s] [max_blocks] names in order. Query head h reads key-value head h // (H / K). With a
    sliding window w a query sees the keys at positions > its own - w. Queries of sequences with context 0 give zeros. What
    is not a sequence's own never matters to it, not even NaN in its last block: one that overflows spoils no other.
    """
    groups = group_pieces(cu_seqlens_q, context_lens, block_tables, k_cache, q.shape[1], sliding_window)
    return attend(q, k_cache, v_cache, groups, scale, sliding_window)


def group_pieces(
    cu_seqlens_q: Tensor | np.ndarray,
    context_lens: Tensor | np.ndarray,
    block_tables: Tensor,
    k_cache: Tensor,
    num_heads: int,
    window: int | None,
) -> list[PieceGroup]:
    """The work of `attend` for a batch of `paged_attention`. Waits for no device where the two index arrays are the host's."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    block_bytes = 2 * block_size * num_kv_heads * head_dim * k_cache.element_size()
    score_bytes = num_heads * block_size * max(4, k_cache.element_size())
    pieces = _cut(cu_seqlens_q.tolist(), context_lens.tolist(), block_size, score_bytes, window)
    pieces.sort(key=lambda piece: (piece.num_queries, piece.num_blocks), reverse=True)
    return [_locate(group, block_tables, block_size) for group in _group(pieces, block_bytes, score_bytes)]


def _locate(group: list[Piece], block_tables: Tensor, block_size: int) -> PieceGroup:
    device = block_tables.device
    numbers = torch.tensor([(p.sequence, p.query, p.num_queries - 1, p.position, p.block) for p in group])
    sequence, query, last, position, block = numbers.to(device, non_blocking=True).unsqueeze(2).unbind(1)  # each [n, 1]
    steps = torch.arange(max(p.num_queries for p in group), device=device).minimum(last)
    entries = block + torch.arange(max(p.num_blocks for p in group), device=device)
    # Blocks past a table's end read its last entry, and no query sees them.
    blocks = block_tables[sequence, entries.clamp(max=block_tables.shape[1] - 1)].clamp(min=0)
    places = (entries.unsqueeze(2) * block_size + torch.arange(block_size, device=device)).flatten(1)
    return PieceGroup(query + steps, position + steps, blocks, places, places > position + last)


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: Sequence[PieceGroup], scale: float, window: int | None) -> Tensor:
    """`paged_attention` of the batch and window that the groups were made for."""
    out = torch.zeros_like(q)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], k_cache, v_cache, group, scale, window)
    return out


def _cut(cu_seqlens_q: list[int], context_lens: list[int], block_size: int, score_bytes: int, window: int | None) -> list[Piece]:
    """Pieces whose scores stay within TEMPORARY_BYTES; a sequence of a few tokens is one piece."""
    pieces = []
    for sequence, context in enumerate(context_lens):
        begin, end = cu_seqlens_q[sequence : sequence + 2]
        if context == 0:
            continue
        step = max(1, TEMPORARY_BYTES // (score_bytes * -(-context // block_size)))
        for query in range(begin, end, step):
            stop = min(query + step, end)
            position = context - (end - query)
            block = 0 if window is None else max(0, position - window + 1) // block_size
            last = (context - (end - stop) - 1) // block_size
            pieces.append(Piece(sequence, query, stop - query, position, block, last - block + 1))
    return pieces


def _group(pieces: list[Piece], block_bytes: int, score_bytes: int) -> Iterator[list[Piece]]:
    """Neighbours that fit TEMPORARY_BYTES when padded to the largest, which is at most twice the smallest."""
    group: list[Piece] = []
    num_queries = num_blocks = 0
    for piece in pieces:
        wide = max(num_blocks, piece.num_blocks)
        bytes_each = max(wide * block_bytes, wide * num_queries * score_bytes)
        alike = 2 * piece.num_queries >= num_queries and 2 * piece.num_blocks >= wide
        if group and not (alike and (len(group) + 1) * bytes_each <= TEMPORARY_BYTES):
            yield group
            group, num_queries, wide = [], 0, piece.num_blocks
        group.append(piece)
        num_queries, num_blocks = max(num_queries, piece.num_queries), wide
    if group:
        yield group


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: PieceGroup, scale: float, window: int | None) -> Tensor:
    """Attention of a group's queries [n, Q, H, D], in that shape."""
    n, num_queries, num_kv_heads = *q.shape[:2], k_cache.shape[2]
    heads_each = q.shape[2] // num_kv_heads
    keys, values = _gather(k_cache, group), _gather(v_cache, group)
    # The query heads of one key-value head become further queries: grouped heads cost no copies of keys.
    queries = q.unflatten(2, (num_kv_heads, heads_each)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = _visible(group.positions.unsqueeze(2), group.places.unsqueeze(1), window)  # [n, Q, L]
    mask = mask.unsqueeze(1).expand(n, heads_each, num_queries, -1).reshape(n, 1, heads_each * num_queries, -1)
    with sdpa_kernel(_BACKENDS):
        y = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return y.unflatten(2, (heads_each, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _gather(cache: Tensor, group: PieceGroup) -> Tensor:
    """The keys or values of each piece's blocks, [n, K, L, D].

    What is foreign becomes 0, since masked places are still multiplied with 0, and 0 * NaN is NaN.
    """
    gathered = cache.index_select(0, group.blocks.flatten()).unflatten(0, group.blocks.shape).flatten(1, 2)
    return gathered.masked_fill_(group.foreign.unsqueeze(2).unsqueeze(3), 0).transpose(1, 2)


def _visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    causal = key_position <= query_position
    return causal if window is None else causal & (key_position > query_position - window)
