"""Lays out, on the host, what the attention kernels of one step do: which block of threads reads which keys for which queries.

The plan of a batch is one int32 buffer (one transfer to the device), made once a step for all layers:
- rows of one query token are cut into segments of similar length, longest first, and short ones share a part;
- chunks of prompts become tiles of at most TILE_ROWS queries;
- prefixes that several rows share (`prefix_groups.py`) become tiles too, whose queries are those rows;
- what one query gets from more than one of these goes through slots of partial results, which `combine` lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from batchinfer.ops.attention_pieces import (
    ALL_KEYS,
    FIELDS,
    TILE_ROWS,
    Array,
    AttentionShape,
    Pieces,
    PlanTuning,
    Rows,
    Tiles,
    cut_rows,
    prefill_tiles,
    prefix_tiles,
)
from batchinfer.ops.prefix_groups import PrefixGroup, find_prefix_groups

__all__ = [
    "ALL_KEYS",
    "TILE_ROWS",
    "AttentionPlan",
    "AttentionShape",
    "PlanCapacity",
    "PlanCounts",
    "PlanTuning",
    "buffer_size",
    "plan_attention",
    "split_buffer",
    "with_tuning",
]

_TWO_LAUNCHES = 20e6  # bytes that the device reads while two more kernels start
_CHUNK_TOKENS, _CHUNKS = 16, 4  # a plan of fixed size has room for one chunk in so many tokens, and some more
_BLOCK_BYTES = 512.0  # of one token and one KV head: keys and values, 128 dimensions, 2 bytes each


class PlanCounts(NamedTuple):
    """Sizes of a plan's arrays."""

    segments: int = 0
    parts: int = 0
    tiles: int = 0
    tile_rows: int = 0
    combine_rows: int = 0
    slots: int = 0


class PlanTooLarge(ValueError):
    """A batch needs more than the fixed sizes of a plan."""


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """Fixed sizes, and a number of rows by which kernels are chosen, so that a CUDA graph finds everything where it was."""

    rows: int
    counts: PlanCounts
    group_tiles: int  # of prefix groups before they are cut, and their queries
    group_queries: int

    @classmethod
    def for_tokens(cls, tokens: int, max_context: int, shape: AttentionShape, tiles: bool = True) -> PlanCapacity:
        """For any rows of one query token, and all but the most scattered chunks of prompts, of at most `tokens` tokens in all.

        Contexts have at most `max_context` tokens. Prefix groups that would not fit (more than one for two rows, or nested more
        than twice) are left out of a plan; chunks that would not fit are a `PlanTooLarge`. Without `tiles` there are neither.
        """
        longest = -(-max_context // shape.block_size)
        segments = tokens + min(shape.wanted_pieces(tokens), tokens * (max(0, longest - 1) // shape.min_blocks))
        tiles = tiles and tokens > 1
        grouped = tiles and shape.window is None
        group_tiles, group_queries = (tokens // 2 + 1, 2 * tokens) if grouped else (0, 0)
        cuts = shape.wanted_tiles if tiles else 0
        chunks = tokens // _CHUNK_TOKENS + _CHUNKS if tiles else 0
        combined = tiles or segments > tokens
        counts = PlanCounts(
            segments=segments,
            parts=segments,
            tiles=group_tiles + chunks + cuts,
            tile_rows=group_queries + (tokens if tiles else 0),
            combine_rows=tokens if combined else 0,
            slots=segments + group_queries + cuts * min(tokens, TILE_ROWS) if combined else 0,
        )
        return cls(tokens, counts, group_tiles, group_queries)

    def without_tiles(self) -> PlanCapacity:
        """The same for batches that share no prefixes and have no chunks: `for_tokens` without them."""
        cut = self.counts.segments > self.rows
        slots, combine_rows = (self.counts.segments, self.rows) if cut else (0, 0)
        counts = self.counts._replace(tiles=0, tile_rows=0, slots=slots, combine_rows=combine_rows)
        return PlanCapacity(self.rows, counts, 0, 0)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Views into `buffer`. `counts` are the arrays' sizes, padding included."""

    buffer: Array
    counts: PlanCounts
    warps: int  # of a part
    segments: Array  # [.., 8]: token row, sequence, kv_begin, kv_end, slot or -1, 0, 0, 0
    part_indptr: Array  # [parts + 1]
    tiles: Array  # [.., 8]: q_begin, q_count, sequence, kv_begin, kv_end, q_position, slot or -1, 0
    tile_rows: Array
    combine_rows: Array  # token rows; -1: padding
    combine_indptr: Array
    combine_slots: Array


def split_buffer(buffer: Any, counts: PlanCounts) -> dict[str, Any]:
    """The arrays of a plan within its buffer, a numpy array or a tensor. Those of records come first: kernels read 16 bytes."""
    sizes = {
        "segments": FIELDS * counts.segments,
        "tiles": FIELDS * counts.tiles,
        "part_indptr": counts.parts + 1,
        "tile_rows": counts.tile_rows,
        "combine_rows": counts.combine_rows,
        "combine_indptr": counts.combine_rows + 1,
        "combine_slots": counts.slots,
    }
    arrays, begin = {}, 0
    for name, size in sizes.items():
        arrays[name], begin = buffer[begin : begin + size], begin + size
    for name in ("segments", "tiles"):
        arrays[name] = arrays[name].reshape(-1, FIELDS)
    return arrays


def buffer_size(counts: PlanCounts) -> int:
    records = FIELDS * (counts.segments + counts.tiles)
    return records + counts.parts + 1 + counts.tile_rows + 2 * counts.combine_rows + 1 + counts.slots


def plan_attention(
    cu_seqlens_q: Array,
    context_lens: Array,
    block_tables: Array,
    shape: AttentionShape,
    capacity: PlanCapacity | None = None,
) -> AttentionPlan:
    """The plan of a batch as `reference.paged_attention` takes it, made from its index arrays on the host.

    cu_seqlens_q [S + 1], context_lens [S], block_tables [S, B], all int32.
    With a capacity the plan has its sizes, or those of `capacity.without_tiles()` where there are neither chunks nor shared
    prefixes. PlanTooLarge: it does not fit them.
    """
    rows = Rows.of(cu_seqlens_q, context_lens)
    prefill = prefill_tiles(cu_seqlens_q, context_lens, shape)
    groups, covered = _worthwhile_groups(rows, block_tables, shape, capacity)
    if capacity is not None and not groups and not len(prefill.items):
        capacity = capacity.without_tiles()
    tiles = Tiles.join(prefill, prefix_tiles(groups, rows, shape)).cut(shape)
    begins = covered * shape.block_size
    if shape.window is not None:
        begins = np.maximum(begins, rows.ends - shape.window)
    num_rows = capacity.rows if capacity else len(rows.token_rows)
    pieces = cut_rows(rows, begins, shape, num_rows, partial=covered > 0)
    return _assemble(tiles, pieces, shape, capacity, num_rows)


def empty_plan(capacity: PlanCapacity, shape: AttentionShape) -> AttentionPlan:
    """A plan of these sizes that has nothing to do."""
    none = np.zeros(0, dtype=np.int32)
    pieces = Pieces(none, none, none, none, none, none.astype(np.bool_))
    return _assemble(Tiles(none.reshape(0, FIELDS), none), pieces, shape, capacity, capacity.rows)


def _worthwhile_groups(
    rows: Rows, block_tables: Array, shape: AttentionShape, capacity: PlanCapacity | None
) -> tuple[list[PrefixGroup], Array]:
    """Groups that save more reading than their partial results and launches cost, and that fit the capacity."""
    none = np.zeros(len(rows.token_rows), dtype=np.intp)
    if shape.window is not None or len(none) < 2 or (capacity and capacity.group_tiles == 0):
        return [], none
    full_blocks = rows.ends // shape.block_size
    tables = block_tables if rows.every_sequence else block_tables[rows.sequences]
    # Of reading a block that a row is spared: a partial result more to write and to read, and the tile's worse use of the device.
    cost = 1.0 + 4 * shape.num_heads / (shape.num_kv_heads * shape.block_size)
    launches = _TWO_LAUNCHES / (shape.num_kv_heads * shape.block_size * _BLOCK_BYTES)
    while True:
        groups, covered = find_prefix_groups(tables, full_blocks, cost)
        saved = sum((len(group.rows) - 1) * (group.end_block - group.first_block) for group in groups)
        if not groups or saved < launches:
            return [], none
        if capacity is None or _groups_fit(groups, capacity):
            return groups, covered
        cost *= 2


def _groups_fit(groups: list[PrefixGroup], capacity: PlanCapacity) -> bool:
    queries = sum(len(group.rows) for group in groups)
    tiles = sum(-(-len(group.rows) // TILE_ROWS) for group in groups)
    return tiles <= capacity.group_tiles and queries <= capacity.group_queries


def _pack(blocks: Array, shape: AttentionShape, num_rows: int) -> Array:
    """Where each part begins among pieces in falling order of length: short ones share a part if there is plenty of work."""
    cost = blocks + 1
    together = min(shape.tuning.max_pack, int(cost.sum()) * shape.num_kv_heads // (8 * shape.parts_at_once(num_rows)))
    if together <= 1:
        return np.arange(len(blocks) + 1, dtype=np.int32)
    part = (np.cumsum(cost) - cost) // together
    return np.concatenate(([0], np.flatnonzero(np.diff(part)) + 1, [len(blocks)])).astype(np.int32)


def _assemble(tiles: Tiles, pieces: Pieces, shape: AttentionShape, capacity: PlanCapacity | None, num_rows: int) -> AttentionPlan:
    order = np.argsort(-pieces.blocks, kind="stable")
    part_indptr = _pack(pieces.blocks[order], shape, num_rows) if len(order) else np.zeros(1, np.int32)
    partial = pieces.partial[order]
    tile_queries, tile_slots = _tile_partials(tiles)
    slots = np.where(partial, np.cumsum(partial) - 1 + len(tile_slots), -1)
    combine_rows, combine_indptr, combine_slots = _combine(
        np.concatenate((tile_queries, pieces.token_rows[order][partial])), np.concatenate((tile_slots, slots[partial]))
    )
    used = PlanCounts(len(order), len(part_indptr) - 1, len(tiles.items), len(tiles.rows), len(combine_rows), len(combine_slots))
    counts = capacity.counts if capacity else used
    if any(a > b for a, b in zip(used, counts, strict=True)):
        raise PlanTooLarge(f"a plan of {used} does not fit {counts}")
    buffer = np.zeros(buffer_size(counts), dtype=np.int32)
    plan = AttentionPlan(buffer, counts, shape.warps(num_rows), **split_buffer(buffer, counts))
    columns = (pieces.token_rows, pieces.sequences, pieces.begins, pieces.ends)
    for i, column in enumerate(columns):
        plan.segments[: used.segments, i] = column[order]
    plan.segments[: used.segments, 4] = slots
    plan.part_indptr[: used.parts + 1], plan.part_indptr[used.parts + 1 :] = part_indptr, used.segments
    plan.tiles[: used.tiles], plan.tile_rows[: used.tile_rows] = tiles.items, tiles.rows
    plan.combine_rows[: used.combine_rows], plan.combine_rows[used.combine_rows :] = combine_rows, -1
    plan.combine_indptr[: used.combine_rows + 1], plan.combine_indptr[used.combine_rows + 1 :] = combine_indptr, used.slots
    plan.combine_slots[: used.slots] = combine_slots
    return plan


def _tile_partials(tiles: Tiles) -> tuple[Array, Array]:
    """Query and slot of every partial result of tiles."""
    items = tiles.items[tiles.items[:, 6] >= 0]
    of = np.repeat(np.arange(len(items)), items[:, 1])
    within = np.arange(len(of)) - np.repeat(np.cumsum(items[:, 1]) - items[:, 1], items[:, 1])
    return tiles.rows[items[of, 0] + within], items[of, 6] + within


def _combine(rows: Array, slots: Array) -> tuple[Array, Array, Array]:
    """The distinct rows, where the slots of each begin, and the slots."""
    if not len(rows):
        return rows, np.zeros(1, np.int32), slots
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    begins = np.concatenate(([0], np.flatnonzero(np.diff(rows)) + 1))
    return rows[begins], np.append(begins, len(rows)), slots[order]


def with_tuning(shape: AttentionShape, **values: int) -> AttentionShape:
    """The same shape with other values of `PlanTuning`: what benchmarks compare."""
    return replace(shape, tuning=replace(shape.tuning, **values))
