"""Attention of a flat batch over the paged KV cache, in plain torch.

Sequences are cut into pieces of bounded work, pieces of similar size are padded to a common shape, and each such group is
gathered from its blocks and computed at once. So decode rows need no loop of their own, and temporary memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    out = torch.zeros_like(q)
    for group in pieces_of(q, k_cache, cu_seqlens_q, context_lens, sliding_window):
        _attend(out, q, k_cache, v_cache, block_tables, group, scale, sliding_window)
    return out


def pieces_of(
    q: Tensor, k_cache: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor, window: int | None
) -> Iterator[list[Piece]]:
    """The attention of a batch in groups of pieces that are to be padded to a common shape and computed at once."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    block_bytes = 2 * block_size * num_kv_heads * head_dim * k_cache.element_size()
    score_bytes = q.shape[1] * block_size * max(4, q.element_size())
    pieces = _cut(cu_seqlens_q.tolist(), context_lens.tolist(), block_size, score_bytes, window)
    pieces.sort(key=lambda piece: (piece.num_queries, piece.num_blocks), reverse=True)
    yield from _group(pieces, block_bytes, score_bytes)


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


def _attend(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    group: list[Piece],
    scale: float,
    window: int | None,
) -> None:
    """Compute one group and put its rows into `out`. n pieces of at most Q queries over L = blocks * block_size keys."""
    device, block_size, num_kv_heads = q.device, k_cache.shape[1], k_cache.shape[2]
    rows = torch.tensor([(p.sequence, p.query, p.num_queries - 1, p.position, p.block) for p in group])
    sequence, query, last, position, block = rows.to(device).unsqueeze(2).unbind(1)  # each [n, 1]
    # A short piece repeats its last query: the same row is computed twice, and nothing needs masking.
    steps = torch.arange(max(p.num_queries for p in group), device=device).minimum(last)  # [n, Q]
    blocks = block + torch.arange(max(p.num_blocks for p in group), device=device)  # [n, B]
    places = (blocks.unsqueeze(2) * block_size + torch.arange(block_size, device=device)).flatten(1)  # [n, L]
    foreign = places > position + last  # beyond the newest query: of another sequence, or of one that was here before
    keys = _gather(k_cache, block_tables, sequence, blocks, foreign)
    values = _gather(v_cache, block_tables, sequence, blocks, foreign)
    mask = _visible((position + steps).unsqueeze(2), places.unsqueeze(1), window)  # [n, Q, L]
    # The query heads of one key-value head become further queries: grouped heads cost no copies of keys.
    n, num_queries, heads_each = len(group), steps.shape[1], q.shape[1] // num_kv_heads
    queries = q[query + steps].unflatten(2, (num_kv_heads, heads_each)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = mask.unsqueeze(1).expand(n, heads_each, num_queries, -1).reshape(n, 1, heads_each * num_queries, -1)
    with sdpa_kernel(_BACKENDS):
        y = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    out[query + steps] = y.unflatten(2, (heads_each, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _gather(cache: Tensor, block_tables: Tensor, sequence: Tensor, blocks: Tensor, foreign: Tensor) -> Tensor:
    """The keys or values of each piece's blocks, [n, K, L, D]. Blocks past a table's end read its last entry.

    What is foreign [n, L] becomes 0, since masked places are still multiplied with 0, and 0 * NaN is NaN.
    """
    numbers = block_tables[sequence, blocks.clamp(max=block_tables.shape[1] - 1)].clamp(min=0)
    gathered = cache.index_select(0, numbers.flatten()).unflatten(0, numbers.shape).flatten(1, 2)
    return gathered.masked_fill_(foreign.unsqueeze(2).unsqueeze(3), 0).transpose(1, 2)


def _visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    causal = key_position <= query_position
    return causal if window is None else causal & (key_position > query_position - window)
