"""Which rows of a batch begin with the same KV-cache blocks: the nested groups that attention reads once instead of per row.

Reading a shared prefix once for all its rows is the idea of Hydragen (Juravsky et al. 2024) and of cascade attention; nested
prefixes make a trie. Here the trie is found anew every step from the block tables alone: rows are sorted by their tables,
and the longest common prefixes of neighbours give all its inner nodes in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.integer[Any]]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Rows that share the blocks first_block..end_block of their tables; what lies before belongs to groups around this one."""

    rows: Indices
    first_block: int
    end_block: int


def find_prefix_groups(tables: Array, full_blocks: Array, cost: float) -> tuple[list[PrefixGroup], Indices]:
    """The groups among tables [N, B], and how many leading blocks of each row [N] they cover.

    Only the first full_blocks[i] entries of row i count. A group must save more reading of blocks than `cost` for each of its
    rows; one that does not leaves its blocks to the groups within it. Without two rows that begin alike this costs
    microseconds.
    """
    covered = np.zeros(len(tables), dtype=np.intp)
    candidates = _begin_alike(tables, full_blocks)
    if not len(candidates):
        return [], covered
    order, common = _sort_by_table(tables, full_blocks, candidates)
    depth = np.zeros(len(order), dtype=np.intp)
    groups = []
    for begin, end, blocks in reversed(list(_trie_nodes(common))):  # outer nodes come before those within them
        first = int(depth[begin])
        if (end - begin - 1) * (blocks - first) > cost * (end - begin):
            groups.append(PrefixGroup(order[begin:end], first, blocks))
            depth[begin:end] = blocks
    covered[order] = depth
    return groups, covered


def _begin_alike(tables: Array, full_blocks: Array) -> Indices:
    """Rows whose first block is also another's."""
    eligible = np.flatnonzero(full_blocks > 0)
    if len(eligible) < 2:
        return eligible[:0]
    first = tables[eligible, 0]
    order = np.argsort(first, kind="stable")
    same = np.diff(first[order]) == 0
    if not same.any():
        return eligible[:0]
    return eligible[order[np.append(same, False) | np.append(False, same)]]


def _sort_by_table(tables: Array, full_blocks: Array, rows: Indices) -> tuple[Indices, list[int]]:
    """`rows` in an order in which equal prefixes are neighbours, and how many blocks each has in common with the next."""
    full = full_blocks[rows]
    width = int(np.partition(full, -2)[-2]) + 1  # one more than any two rows can share
    own = -1 - np.arange(len(rows), dtype=np.int32)  # stands for what is no full block: differs from everything
    sorted_by = np.where(np.arange(width) < full[:, None], _padded(tables, rows, width), own[:, None])
    raw, step = sorted_by.tobytes(), width * sorted_by.itemsize
    keys = [raw[i * step : (i + 1) * step] for i in range(len(rows))]
    order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.intp)
    ordered = sorted_by[order]
    return rows[order], np.argmax(ordered[1:] != ordered[:-1], axis=1).tolist()


def _padded(tables: Array, rows: Indices, width: int) -> Array:
    taken = tables[rows, :width]
    return taken if taken.shape[1] == width else np.pad(taken, ((0, 0), (0, width - taken.shape[1])))


def _trie_nodes(common: list[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, end, blocks) of every run of neighbours that share more blocks than a longer run does: inner runs first."""
    open_nodes = [(0, 0)]  # (blocks, begin), ever deeper
    for i, blocks in enumerate([*common, 0]):
        begin = i
        while open_nodes[-1][0] > blocks:
            deeper, begin = open_nodes.pop()
            yield begin, i + 1, deeper
        if open_nodes[-1][0] < blocks:
            open_nodes.append((blocks, begin))
