"""Cuts the attention of a batch into the pieces that blocks of threads take: rows of one query token, and tiles of queries.

What a batch needs is cut evenly here; `attention_plan.py` puts the pieces in order and into one buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchinfer.ops.prefix_groups import PrefixGroup

Array = NDArray[np.integer[Any]]

TILE_ROWS = 128  # queries of a tile: a constant of the tile kernel
ALL_KEYS = 2**30  # the q_position of queries that see every key of their tile
FIELDS = 8  # of a segment and of a tile


@dataclass(frozen=True, slots=True)
class PlanTuning:
    """How finely work is cut. Chosen by measuring; no result depends on it beyond rounding."""

    waves: int = 1  # no segment is longer than 1 / waves of what each block of threads would do if all were equal
    min_piece: int = 512  # tokens: shorter rows are never cut
    min_tile_piece: int = 256  # tokens, likewise of tiles
    max_pack: int = 16  # KV blocks (and rows) that are put into one part when there is plenty of work
    warps: int = 0  # of a part; 0: by how many rows there are


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a plan needs to know of model and device."""

    block_size: int
    num_heads: int
    num_kv_heads: int
    num_multiprocessors: int
    window: int | None = None
    tuning: PlanTuning = field(default_factory=PlanTuning)

    @property
    def min_blocks(self) -> int:
        """Rows of so many blocks are never cut."""
        return max(1, self.tuning.min_piece // self.block_size)

    @property
    def wanted_tiles(self) -> int:
        """How many tiles of one query head fill the device."""
        return max(1, 2 * self.num_multiprocessors // self.num_heads)

    @property
    def resident_warps(self) -> int:
        """Of a multiprocessor, by the registers that the decode kernel takes for a group of query heads."""
        group = self.num_heads // self.num_kv_heads
        return 16 if group <= 4 else 12 if group <= 8 else 8

    def warps(self, rows: int) -> int:
        """How many work on a part of one KV head: few where there are many parts, else what leaves fewer idle in the end."""
        parts, device, most = rows * self.num_kv_heads, self.num_multiprocessors, self.resident_warps
        if self.tuning.warps:
            return self.tuning.warps
        if parts > 8 * device:
            return 4
        return most if -parts % device * most < -parts % (2 * device) * (most // 2) else most // 2

    def parts_at_once(self, rows: int) -> int:
        """How many parts of one KV head the device works on at the same time."""
        return self.num_multiprocessors * max(1, self.resident_warps // self.warps(rows))

    def wanted_pieces(self, rows: int) -> int:
        """Into how many pieces all the rows together are cut where they are long."""
        return max(1, self.tuning.waves * self.parts_at_once(rows) // self.num_kv_heads)


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries that decode attention answers: those of sequences with one, and those of sequences without context (zeros)."""

    token_rows: Array
    sequences: Array
    ends: Array
    every_sequence: bool  # has one query: row i is that of sequence i

    @classmethod
    def of(cls, cu_seqlens_q: Array, context_lens: Array) -> Rows:
        counts = np.diff(cu_seqlens_q)
        chosen = np.where((counts == 1) | (context_lens == 0), counts, 0)
        if (chosen == 1).all():
            sequences = np.arange(len(counts))
            return cls(cu_seqlens_q[:-1], sequences, context_lens, True)
        sequences = np.repeat(np.arange(len(counts)), chosen)
        within = np.arange(len(sequences)) - np.repeat(np.cumsum(chosen) - chosen, chosen)
        return cls(cu_seqlens_q[sequences] + within, sequences, context_lens[sequences], False)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Segments of rows before they are put in order, [P] each. `partial`: others answer the same query too."""

    token_rows: Array
    sequences: Array
    begins: Array
    ends: Array
    blocks: Array
    partial: NDArray[np.bool_]


def cut_rows(rows: Rows, begins: Array, shape: AttentionShape, num_rows: int, partial: NDArray[np.bool_]) -> Pieces:
    """Long rows in equal pieces of whole blocks; a row without context is one. What prefix groups cover wholly leaves none."""
    size = shape.block_size
    first = begins // size
    blocks = -(-rows.ends // size) - first
    blocks[begins >= rows.ends] = 0
    longest = max(shape.min_blocks, -(-int(blocks.sum()) // shape.wanted_pieces(num_rows)))
    counts = np.maximum(1, -(-blocks // longest))
    counts[partial & (blocks == 0)] = 0
    if (counts == 1).all():
        return Pieces(rows.token_rows, rows.sequences, begins, rows.ends, blocks, partial)
    of = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    low, high = blocks[of] * within // counts[of], blocks[of] * (within + 1) // counts[of]
    return Pieces(
        rows.token_rows[of],
        rows.sequences[of],
        np.maximum(begins[of], (first[of] + low) * size),
        np.minimum(rows.ends[of], (first[of] + high) * size),
        high - low,
        partial[of] | (counts[of] > 1),
    )


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles [N, 8] whose field 6 is 1 where the result is partial and -1 where not, and their queries."""

    items: Array
    rows: Array

    @staticmethod
    def join(a: Tiles, b: Tiles) -> Tiles:
        if not len(b.items):
            return a
        moved = b.items.copy()
        moved[:, 0] += len(a.rows)
        return Tiles(np.concatenate((a.items, moved)), np.concatenate((a.rows, b.rows)))

    def cut(self, shape: AttentionShape) -> Tiles:
        """The same, cut along the keys where there are too few to fill the device (at most `wanted_tiles` more); longest first,
        with slots."""
        items = self.items
        if not len(items):
            return self
        keys = items[:, 4] - items[:, 3]
        longest = max(shape.tuning.min_tile_piece, shape.block_size, -(-int(keys.sum()) // shape.wanted_tiles))
        counts = np.maximum(1, -(-keys // longest))
        if (counts > 1).any():
            items = _cut_tiles(items, keys, counts, shape.block_size)
        work = (items[:, 4] - items[:, 3]) * np.minimum(items[:, 1] + 16, TILE_ROWS)
        items = items[np.argsort(-work, kind="stable")]
        slots = np.where(items[:, 6] > 0, items[:, 1], 0)
        items[:, 6] = np.where(items[:, 6] > 0, np.cumsum(slots) - slots, -1)
        return Tiles(items, self.rows)


def _cut_tiles(items: Array, keys: Array, counts: Array, size: int) -> Array:
    of = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    cut = items[of]
    begin, end = cut[:, 3].copy(), cut[:, 4].copy()
    low, high = ((begin + keys[of] * step // counts[of]) // size * size for step in (within, within + 1))
    cut[:, 3] = np.where(within == 0, begin, low)
    cut[:, 4] = np.where(within == counts[of] - 1, end, high)
    cut[counts[of] > 1, 6] = 1
    return cut


def prefill_tiles(cu_seqlens_q: Array, context_lens: Array, shape: AttentionShape) -> Tiles:
    counts = np.diff(cu_seqlens_q)
    sequences = np.flatnonzero((counts > 1) & (context_lens > 0))
    items, begin = [], 0
    rows = [np.arange(cu_seqlens_q[s], cu_seqlens_q[s + 1], dtype=np.int32) for s in sequences]
    for s in sequences.tolist():
        count, context = int(counts[s]), int(context_lens[s])
        for first in range(0, count, TILE_ROWS):
            taken = min(TILE_ROWS, count - first)
            position = context - count + first
            kv_begin = 0 if shape.window is None else max(0, position - shape.window + 1)
            items.append((begin + first, taken, s, kv_begin, position + taken, position, -1, 0))
        begin += count
    return Tiles(np.array(items, dtype=np.int32).reshape(-1, FIELDS), np.concatenate([np.zeros(0, np.int32), *rows]))


def prefix_tiles(groups: list[PrefixGroup], rows: Rows, shape: AttentionShape) -> Tiles:
    items, begin = [], 0
    for group in groups:
        sequence, count = int(rows.sequences[group.rows[0]]), len(group.rows)
        kv = group.first_block * shape.block_size, group.end_block * shape.block_size
        for first in range(0, count, TILE_ROWS):
            items.append((begin + first, min(TILE_ROWS, count - first), sequence, *kv, ALL_KEYS, 1, 0))
        begin += count
    queries = rows.token_rows[np.concatenate([group.rows for group in groups])] if groups else np.zeros(0, np.int32)
    return Tiles(np.array(items, dtype=np.int32).reshape(-1, FIELDS), queries.astype(np.int32))
