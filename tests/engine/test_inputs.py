"""What a model reads of a step: every array in its place, block tables found through the plan, padding harmless."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchinfer import ops
from batchinfer.engine.batch import Batch
from batchinfer.engine.cuda_graphs import graph_sizes
from batchinfer.engine.inputs import ALIGNED, InputPacker

BLOCK = 16
SHAPE = ops.AttentionShape(block_size=BLOCK, num_heads=4, num_kv_heads=2, num_multiprocessors=132)


def batch_of(counts: list[int], contexts: list[int], seed: int = 0) -> Batch:
    """A batch of sequences with so many tokens in the step and so much context, over blocks that nobody shares."""
    random = np.random.default_rng(seed)
    width = -(-max(contexts) // BLOCK)
    batch = Batch.empty(sum(counts), len(counts), width, len(counts))
    batch.cu_seqlens_q[:] = np.concatenate(([0], np.cumsum(counts)))
    batch.context_lens[:] = contexts
    batch.token_ids[:] = random.integers(0, 1000, sum(counts))
    batch.positions[:] = np.concatenate([np.arange(n - c, n) for c, n in zip(counts, contexts, strict=True)])
    batch.slot_mapping[:] = random.integers(0, 9999, sum(counts))
    batch.block_tables[:] = random.permutation(len(counts) * width).reshape(len(counts), width)
    return batch


def tables_read(inputs_table: torch.Tensor, starts: np.ndarray, width: int) -> np.ndarray:
    return inputs_table.flatten().numpy()[starts[:, None] + np.arange(width)]


@pytest.mark.parametrize("windows", [[None], [None, 40], [40]])
@pytest.mark.parametrize("size", [None, 37, 64, 65])
def test_rows_and_chunks_find_their_own_blocks(windows: list[int | None], size: int | None) -> None:
    batch = batch_of([1, 1, 30, 1, 4], [5, 700, 30, 33, 410])
    packed = InputPacker(windows, SHAPE, max_context=1024).pack(batch, size)
    inputs = packed.over(torch.from_numpy(packed.buffer), num_heads=4, head_dim=64)
    count, width = batch.num_tokens, batch.block_tables.shape[1]
    assert packed.size == (size or count) and packed.has_tiles
    assert inputs.token_ids[:count].tolist() == batch.token_ids.tolist()
    assert inputs.positions[:count].tolist() == batch.positions.tolist()
    slots = inputs.attention.slot_mapping
    assert slots[:count].tolist() == batch.slot_mapping.tolist() and (slots[count:] == -1).all()
    assert inputs.attention.plans is not None and list(inputs.attention.plans) == windows
    for plan in inputs.attention.plans.values():
        assert plan.segments.data_ptr() % (4 * ALIGNED) == packed.buffer.ctypes.data % (4 * ALIGNED)
        segments = plan.segments.numpy()[: int(plan.part_indptr[-1])]
        sequence = np.searchsorted(batch.cu_seqlens_q, segments[:, 0], side="right") - 1
        assert set(sequence) == {0, 1, 3}
        read = tables_read(inputs.attention.block_tables, segments[:, 1], width)
        assert np.array_equal(read, batch.block_tables[sequence])
        tiles = plan.tiles.numpy()[plan.tiles.numpy()[:, 1] > 0]
        sequence = np.searchsorted(batch.cu_seqlens_q, plan.tile_rows.numpy()[tiles[:, 0]], side="right") - 1
        assert set(sequence) == {2, 4}
        read = tables_read(inputs.attention.block_tables, tiles[:, 2], width)
        assert np.array_equal(read, batch.block_tables[sequence])


@pytest.mark.parametrize("size", [1, 3, 48])
def test_a_graph_is_captured_with_what_its_steps_will_fill(size: int) -> None:
    packer = InputPacker([None, 40], SHAPE, max_context=1024)
    rows = packer.pack(batch_of([1] * size, [100] * size), size)
    padding = packer.padding(size, tiles=False)
    assert not rows.has_tiles and not padding.has_tiles and (padding.buffer[2 * size : 3 * size] == -1).all()
    for window in (None, 40):
        assert rows.plans[window].counts == padding.plans[window].counts
        assert rows.plans[window].warps == padding.plans[window].warps
    assert len(rows.buffer) == len(padding.buffer) + size * 7


def test_scattered_chunks_do_not_fit_a_graph() -> None:
    packer = InputPacker([40], replace(SHAPE, num_heads=32), max_context=1024)
    with pytest.raises(ops.PlanTooLarge):
        packer.pack(batch_of([2] * 32, [20] * 32), 64)


def test_sizes_of_graphs_reach_every_row_and_no_further() -> None:
    assert graph_sizes(512, 2048)[-1] == graph_sizes(8, 2048)[-1] == 512
    assert graph_sizes(700, 2048)[-1] == 700 and graph_sizes(512, 100) == [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100]
