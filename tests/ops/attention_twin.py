"""A plan of attention carried out in plain torch, one record at a time: what the three kernels do, too simple to be wrong.

Also `covered`, which says what each query sees by the plan, so that a test can ask for everything exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from batchinfer.ops.attention_plan import AttentionPlan
from tests.ops.attention_cases import AttentionCase

Partial = tuple[torch.Tensor, torch.Tensor]  # [H, D] normalised, and log2 of the sum [H]


def queries(plan: AttentionPlan, window: int | None) -> Iterator[tuple[int, int, np.ndarray, int]]:
    """Token row, sequence whose table is read, key positions, and slot or -1, of every segment and every query of a tile."""
    for part in range(len(plan.part_indptr) - 1):
        for row, sequence, begin, end, slot in plan.segments[plan.part_indptr[part] : plan.part_indptr[part + 1], :5].tolist():
            yield row, sequence, np.arange(begin, end), slot
    for q_begin, count, sequence, begin, end, position, slot, _ in plan.tiles.tolist():
        for i in range(count):
            keys = np.arange(begin, min(end, position + i + 1))
            if window is not None:
                keys = keys[keys > position + i - window]
            yield int(plan.tile_rows[q_begin + i]), sequence, keys, slot + i if slot >= 0 else -1


def covered(plan: AttentionPlan, case: AttentionCase) -> dict[int, Counter[tuple[int, int]]]:
    """Of each token row: how often it sees each (block, token in the block). Checks that results go where they are looked for."""
    seen: dict[int, Counter[tuple[int, int]]] = {}
    row_of_slot: dict[int, int] = {}
    direct: Counter[int] = Counter()
    for row, sequence, keys, slot in queries(plan, case.window):
        blocks = case.block_tables[sequence, keys // case.block_size]
        seen.setdefault(row, Counter()).update(zip(blocks.tolist(), (keys % case.block_size).tolist(), strict=True))
        if slot < 0:
            direct[row] += 1
        else:
            assert slot not in row_of_slot, "two results in one slot"
            row_of_slot[slot] = row
    combined = {
        int(row): plan.combine_slots[plan.combine_indptr[i] : plan.combine_indptr[i + 1]].tolist()
        for i, row in enumerate(plan.combine_rows)
        if row >= 0
    }
    for row, slots in combined.items():
        assert slots and direct[row] == 0, "a row written twice"
        assert all(row_of_slot.pop(slot) == row for slot in slots)
    assert not row_of_slot, "a partial result that nobody reads"
    assert all(count == 1 for count in direct.values()) and seen.keys() == direct.keys() | combined.keys()
    return seen


def execute(plan: AttentionPlan, case: AttentionCase) -> torch.Tensor:
    """The batch in float64. What the plan leaves out is NaN."""
    q = case.q.double()
    out = torch.full(q.shape, float("nan"), dtype=torch.float64)
    slots: dict[int, Partial] = {}
    for row, sequence, keys, slot in queries(plan, case.window):
        partial = _attend(q[row], case, case.block_tables[sequence, keys // case.block_size], keys % case.block_size)
        if slot >= 0:
            slots[slot] = partial
        else:
            out[row] = partial[0]
    for i, row in enumerate(plan.combine_rows.tolist()):
        if row >= 0:
            partials = [slots[s] for s in plan.combine_slots[plan.combine_indptr[i] : plan.combine_indptr[i + 1]].tolist()]
            outs, lse = torch.stack([p[0] for p in partials]), torch.stack([p[1] for p in partials])
            out[row] = (torch.softmax(lse * np.log(2), 0).unsqueeze(2) * outs).sum(0)
    return out


def _attend(q: torch.Tensor, case: AttentionCase, blocks: np.ndarray, places: np.ndarray) -> Partial:
    if not len(blocks):
        return torch.zeros_like(q), torch.full(q.shape[:1], -float("inf"), dtype=torch.float64)
    keys, values = (c[blocks, places].double().repeat_interleave(len(q) // c.shape[2], 1) for c in (case.k_cache, case.v_cache))
    scores = torch.einsum("hd,khd->hk", q, keys) * case.scale
    out = torch.einsum("hk,khd->hd", scores.softmax(1), values)
    return out, scores.logsumexp(1) / np.log(2)
