"""Plans of attention: every query sees every key of its own exactly once, and carried out they give what the reference gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchinfer.ops.attention_pieces import prefill_tiles
from batchinfer.ops.attention_plan import (
    TILE_ROWS,
    AttentionPlan,
    AttentionShape,
    PlanCapacity,
    PlanTooLarge,
    buffer_size,
    empty_plan,
    plan_attention,
    with_tuning,
)
from batchinfer.ops.prefix_groups import find_prefix_groups
from tests.ops.attention_cases import AttentionCase, make_case
from tests.ops.attention_twin import covered, execute


def shape_of(case: AttentionCase, **tuning: int) -> AttentionShape:
    made = AttentionShape(case.block_size, case.q.shape[1], case.k_cache.shape[2], tuning.pop("multiprocessors", 4), case.window)
    return with_tuning(made, **tuning)


def plan_of(case: AttentionCase, shape: AttentionShape, capacity: PlanCapacity | None = None) -> AttentionPlan:
    plan = plan_attention(case.cu_seqlens_q, case.context_lens, case.block_tables, shape, capacity)
    for segment in plan.segments[: plan.part_indptr[-1]]:
        assert 0 <= segment[2] <= segment[3]
    assert (np.diff(plan.part_indptr) >= 0).all() and plan.part_indptr[0] == 0
    for tile in plan.tiles:
        assert 0 <= tile[1] <= TILE_ROWS and 0 <= tile[3] <= tile[4] <= tile[5] + tile[1] and tile[7] == 0
    return plan


def check(case: AttentionCase, plan: AttentionPlan) -> None:
    """Brute force over all queries and keys."""
    seen = covered(plan, case)
    for s, context in enumerate(case.context_lens.tolist()):
        begin, end = case.cu_seqlens_q[s : s + 2].tolist()
        for row in range(begin, end):
            position = context - (end - row)
            first = 0 if case.window is None else max(0, position - case.window + 1)
            keys = np.arange(first, position + 1) if context else np.arange(0)
            blocks = case.block_tables[s, keys // case.block_size].tolist()
            wanted = dict.fromkeys(zip(blocks, (keys % case.block_size).tolist(), strict=True), 1)
            assert seen.pop(row) == wanted, f"row {row} of sequence {s}"
    assert not seen


def random_case(seed: int) -> AttentionCase:
    """Ragged, with nested and several prefix groups, chunks of prompts, empty sequences and padding, in any mixture."""
    random = np.random.default_rng(seed)
    block_size, rows = int(random.choice([16, 32, 48])), int(random.integers(1, 24))
    contexts = random.integers(1, random.choice([20, 200, 900]), rows)
    counts = np.where(random.random(rows) < random.choice([0, 0.3]), random.integers(1, 160, rows), 1)
    shared = []
    if random.random() < 0.7:
        for parts in (1, 2, 6):  # a prefix of all, then of halves, then of sixths, each of which has it wholly
            blocks = parts * int(random.integers(1, 8))
            for members in np.array_split(np.arange(rows), parts):
                if len(members):
                    shared.append((members.tolist(), blocks))
        longest = max(blocks for _, blocks in shared)
        contexts = contexts + np.where(random.random(rows) < 0.8, longest * block_size, 0)
        shared = [([s for s in members if contexts[s] > blocks * block_size], blocks) for members, blocks in reversed(shared)]
        shared = [(members, blocks) for members, blocks in shared if members]
    contexts = np.maximum(contexts, counts)
    empty = random.random(rows) < random.choice([0, 0.2])
    contexts[empty] = 0
    shared = [([s for s in members if not empty[s]], blocks) for members, blocks in shared]
    shared = [(members, blocks) for members, blocks in shared if members]
    counts[empty] = random.integers(0, 4, int(empty.sum()))
    window = int(random.integers(1, 200)) if random.random() < 0.3 else None
    kv_heads = int(random.choice([1, 2]))
    return make_case(
        contexts.tolist(),
        counts.tolist(),
        shared,
        heads=2,
        kv_heads=kv_heads,
        dim=8,
        block_size=block_size,
        window=window,
        seed=seed,
    )


def cheap_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small prefixes count, as they do not on a device."""
    monkeypatch.setattr("batchinfer.ops.attention_plan._TWO_LAUNCHES", 0.0)


@pytest.mark.parametrize("first", range(0, 48, 12))
def test_every_query_sees_every_key_once(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_groups(monkeypatch)
    random = np.random.default_rng(first)
    for seed in range(first, first + 12):
        case = random_case(seed)
        for tuning in ({}, {"min_piece": 16, "waves": 40, "min_tile_piece": 16}, {"multiprocessors": 1, "max_pack": 200}):
            shape = shape_of(case, warps=int(random.choice([0, 1, 16])), **tuning)
            check(case, plan_of(case, shape))


@pytest.mark.parametrize("first", range(0, 24, 8))
def test_carried_out_it_is_the_reference(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_groups(monkeypatch)
    for seed in range(first, first + 8):
        case = random_case(seed)
        plan = plan_of(case, shape_of(case, min_piece=64, min_tile_piece=64, waves=10))
        torch.testing.assert_close(execute(plan, case), case.want(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_a_capacity_holds_any_batch_of_its_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_groups(monkeypatch)
    case = random_case(seed)
    single = case.cu_seqlens_q[:-1][np.diff(case.cu_seqlens_q) == 1]
    sequences = np.searchsorted(case.cu_seqlens_q, single, side="right") - 1
    case.block_tables, case.context_lens = case.block_tables[sequences], case.context_lens[sequences]
    case.cu_seqlens_q, case.q = np.arange(len(single) + 1, dtype=np.int32), case.q[single]
    for rows in (len(single), len(single) + 7):
        shape = shape_of(case, min_piece=16 * int(1 + seed % 3), waves=int(1 + seed % 20))
        capacity = PlanCapacity.for_tokens(rows, int(case.context_lens.max(initial=1)), shape)
        plan = plan_of(case, shape, capacity)
        expected = capacity if len(plan.tiles) else capacity.without_tiles()
        assert plan.counts == expected.counts and plan.warps == shape.warps(rows)
        assert capacity.without_tiles() == PlanCapacity.for_tokens(
            rows, int(case.context_lens.max(initial=1)), shape, tiles=False
        )
        check(case, plan)
        none = plan_of(case, shape, PlanCapacity.for_tokens(rows, int(case.context_lens.max(initial=1)), shape, tiles=False))
        assert len(none.tiles) == 0
        check(case, none)


@pytest.mark.parametrize("seed", range(30))
def test_a_capacity_holds_chunks_beside_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_groups(monkeypatch)
    case = random_case(seed)
    tokens, longest = int(case.cu_seqlens_q[-1]), int(case.context_lens.max(initial=1))
    shape = shape_of(case, min_piece=16 * int(1 + seed % 3), waves=int(1 + seed % 20))
    for size in (tokens, tokens + 7, 4 * tokens):
        capacity = PlanCapacity.for_tokens(size, longest, shape)
        try:
            plan = plan_of(case, shape, capacity)
        except PlanTooLarge:
            assert len(prefill_tiles(case.cu_seqlens_q, case.context_lens, shape).items) > size // 16 + 4, "it is not scattered"
            continue
        assert plan.counts == (capacity if len(plan.tiles) else capacity.without_tiles()).counts
        check(case, plan)


def test_an_empty_plan_has_the_sizes_of_its_capacity_and_nothing_to_do() -> None:
    shape = AttentionShape(block_size=16, num_heads=8, num_kv_heads=2, num_multiprocessors=132)
    capacity = PlanCapacity.for_tokens(40, 2048, shape)
    for sizes in (capacity, capacity.without_tiles()):
        plan = empty_plan(sizes, shape)
        assert plan.counts == sizes.counts and len(plan.buffer) == buffer_size(sizes.counts)
        assert not plan.part_indptr.any() and not plan.tiles[:, 1].any() and (plan.combine_rows == -1).all()


def naive_groups(tables: list[list[int]]) -> set[tuple[frozenset[int], int, int]]:
    """Inner nodes of the trie, as (rows, first block, end block)."""
    found = {}
    for i, table in enumerate(tables):
        for blocks in range(1, len(table) + 1):
            rows = frozenset(j for j, other in enumerate(tables) if other[:blocks] == table[:blocks])
            if len(rows) > 1 and i in rows:
                low, high = found.get(rows, (blocks - 1, blocks))
                found[rows] = min(low, blocks - 1), max(high, blocks)
    return {(rows, low, high) for rows, (low, high) in found.items()}


@pytest.mark.parametrize("seed", range(60))
def test_prefix_groups_are_the_nodes_of_the_trie(seed: int) -> None:
    random = np.random.default_rng(seed)
    tables = random.integers(0, random.choice([1, 2, 3]) + 1, (int(random.integers(0, 14)), 6)).astype(np.int32)
    full = random.integers(0, 7, len(tables))
    groups, covered_blocks = find_prefix_groups(tables, full, cost=0.0)
    ours = {(frozenset(group.rows.tolist()), group.first_block, group.end_block) for group in groups}
    assert len(ours) == len(groups)
    assert ours == naive_groups([table[:count].tolist() for table, count in zip(tables, full, strict=True)])
    for row in range(len(tables)):
        ends = [high for rows, _, high in ours if row in rows]
        assert covered_blocks[row] == max(ends, default=0)


def test_a_group_that_is_not_worth_it_leaves_its_blocks_to_those_within() -> None:
    tables = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 7, 8, 9, 9], [2, 2, 2, 2, 2]], dtype=np.int32)
    groups, covered_blocks = find_prefix_groups(tables, np.full(4, 5), cost=0.7)
    # One block for three rows saves two, less than 2.1; four blocks for two rows save four.
    assert [(sorted(group.rows.tolist()), group.first_block, group.end_block) for group in groups] == [([0, 1], 0, 4)]
    assert covered_blocks.tolist() == [4, 4, 0, 0]


def test_a_short_row_needs_no_merging_and_long_rows_fill_the_device() -> None:
    shape = AttentionShape(16, 32, 32, 132)
    for rows, context, parts, merged in ((1, 256, 1, 0), (16, 128, 16, 0), (1, 8192, 4, 1), (3, 2000, 6, 3)):
        case_plan = plan_attention(
            np.arange(rows + 1, dtype=np.int32),
            np.full(rows, context, np.int32),
            np.arange(1, 1 + rows * 512, dtype=np.int32).reshape(rows, 512),
            shape,
        )
        assert (case_plan.counts.parts, case_plan.counts.combine_rows) == (parts, merged)


def test_longest_segments_come_first_and_short_ones_share_a_part() -> None:
    contexts = np.random.default_rng(0).integers(1, 2000, 500).astype(np.int32)
    tables = np.arange(1, 1 + 500 * 125, dtype=np.int32).reshape(500, 125)
    plan = plan_attention(np.arange(501, dtype=np.int32), contexts, tables, AttentionShape(16, 32, 32, 132))
    lengths = plan.segments[:, 3] - plan.segments[:, 2]
    assert (np.diff(-(-lengths // 16)) <= 0).all()
    assert plan.counts.parts < 500 and plan.counts.slots == 0


def test_no_step_without_queries() -> None:
    plan = plan_attention(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros((0, 0), np.int32), AttentionShape(16, 2, 2, 4))
    assert plan.counts == (0, 0, 0, 0, 0, 0)
