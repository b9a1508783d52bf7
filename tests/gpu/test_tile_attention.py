"""Tile attention on a GPU against the reference: chunks behind contexts, windows, grouped heads, shared prefixes, partials."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from batchinfer.ops.compiled import PATH, load_kernels
from batchinfer.ops.reference_attention import paged_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(not PATH.exists(), reason="the kernels are not built"),
]

TILE_ROWS = 128
SEES_ALL = 2**30  # q_position of rows that see every key of their item
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
FORMS = [  # head_dim, query heads, key-value heads, block size, dtype
    (128, 4, 4, 16, torch.bfloat16),
    (128, 8, 2, 16, torch.bfloat16),
    (64, 6, 2, 16, torch.float16),
    (64, 4, 4, 32, torch.bfloat16),
    (128, 16, 1, 64, torch.float16),
    (128, 5, 1, 48, torch.bfloat16),
    (64, 3, 3, 128, torch.float16),
    (128, 2, 2, 256, torch.bfloat16),
]


@dataclass
class Batch:
    """Sequences over a cache whose every foreign place is NaN."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    starts: list[int]  # [S + 1], of the query rows
    contexts: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def reference(self, window: int | None = None) -> Tensor:
        q, k_cache, v_cache = (tensor.double() for tensor in (self.q, self.k_cache, self.v_cache))
        starts, contexts = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in (self.starts, self.contexts))
        return paged_attention(q, k_cache, v_cache, self.tables, starts, contexts, self.scale, window)


def make_batch(form: tuple[int, int, int, int, torch.dtype], lengths: list[tuple[int, int]], seed: int = 0) -> Batch:
    """`lengths`: (query rows, context) of every sequence."""
    head_dim, heads, kv_heads, block_size, dtype = form
    torch.manual_seed(seed)
    counts = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks).tolist()
    tables = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
    caches = [torch.full((num_blocks, kv_heads, block_size, head_dim), torch.nan) for _ in "kv"]
    for s, (_, context) in enumerate(lengths):
        tables[s, : counts[s]] = torch.tensor([order.pop() for _ in range(counts[s])])
        for i in range(counts[s]):
            own = min(block_size, context - i * block_size)
            for cache in caches:
                cache[tables[s, i], :, :own] = torch.randn(kv_heads, own, head_dim)
    k_cache, v_cache = (cache.to("cuda", dtype).transpose(1, 2) for cache in caches)
    starts = [0]
    for rows, _ in lengths:
        starts.append(starts[-1] + rows)
    q = torch.randn(starts[-1], heads + 2, head_dim).to("cuda", dtype)[:, 1:-1] * 2  # rows are strided
    return Batch(q, k_cache, v_cache, tables.cuda(), starts, [context for _, context in lengths])


def chunk_items(
    batch: Batch, window: int | None = None, split: int | None = None, tile: int = TILE_ROWS
) -> tuple[list[list[int]], int]:
    """The items of every sequence, with `split` keys at most each as partials; also how many slots those take."""
    items, slots = [], 0
    for s, context in enumerate(batch.contexts):
        begin, end = batch.starts[s : s + 2]
        for first in range(begin, end, tile):
            count = min(tile, end - first)
            position = context - (end - first)
            low, high = 0 if window is None else max(0, position - window + 1), position + count
            if split is None:
                items.append([first, count, s, low, high, position, -1, 0])
                continue
            for low_part in range(low, high, split):
                items.append([first, count, s, low_part, min(high, low_part + split), position, slots, 0])
                slots += count
    items.sort(key=lambda item: item[3] - item[4])
    return items, slots


def run_items(
    batch: Batch, items: list[list[int]], rows: list[int], slots: int, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    load_kernels()
    tiles = torch.tensor([*items, [0] * 8, [0] * 8], dtype=torch.int32, device="cuda")
    tile_rows = torch.tensor(rows, dtype=torch.int32, device="cuda")
    out = torch.full(batch.q.shape, torch.nan, dtype=batch.q.dtype, device="cuda")
    partial_out = torch.full((slots, *batch.q.shape[1:]), torch.nan, device="cuda")
    partial_lse = torch.full((slots, batch.q.shape[1]), torch.nan, device="cuda")
    torch.ops.batchinfer.tile_attention(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.tables,
        tiles,
        tile_rows,
        out,
        partial_out,
        partial_lse,
        batch.scale,
        window or 0,
    )
    torch.cuda.synchronize()
    return out, partial_out, partial_lse


def combine(batch: Batch, items: list[list[int]], rows: list[int], partial_out: Tensor, partial_lse: Tensor) -> Tensor:
    """Adds up the partials of every row in float64."""
    total = torch.zeros(batch.q.shape, dtype=torch.float64, device="cuda")
    weight = torch.zeros(batch.q.shape[:2], dtype=torch.float64, device="cuda")
    for begin, count, *_, slot, _ in items:
        index = torch.tensor(rows[begin : begin + count], device="cuda")
        part = torch.exp2(partial_lse[slot : slot + count].double())
        total.index_add_(0, index, partial_out[slot : slot + count].double() * part.unsqueeze(2))
        weight.index_add_(0, index, part)
    return total / weight.unsqueeze(2)


def check(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert not out.isnan().any(), f"{int(out.isnan().any(2).any(1).sum())} rows hold NaN"
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"
    worst = ((out.double() - expected).norm(dim=2) / expected.norm(dim=2).clamp(min=0.05)).max().item()
    assert worst < 4 * TOLERANCE[dtype], f"relative error of one row {worst:.2e}"


LENGTHS = [(1, 1), (17, 17), (130, 130), (5, 300), (128, 128), (300, 811), (64, 64), (129, 1000), (256, 384), (2, 2), (33, 127)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("window", [None, 40, 500])
def test_chunks_are_those_of_the_reference(form: tuple[int, int, int, int, torch.dtype], window: int | None) -> None:
    batch = make_batch(form, LENGTHS, seed=window or 0)
    items, _ = chunk_items(batch, window)
    out, *_ = run_items(batch, items, list(range(batch.q.shape[0])), 0, window)
    check(out, batch.reference(window), form[4])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tile", [7, 64, 100])
def test_items_of_any_number_of_rows(form: tuple[int, int, int, int, torch.dtype], tile: int) -> None:
    batch = make_batch(form, LENGTHS, seed=tile)
    items, _ = chunk_items(batch, tile=tile)
    out, *_ = run_items(batch, items, list(range(batch.q.shape[0])), 0)
    check(out, batch.reference(), form[4])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("split", "window"), [(100, None), (333, 200)])
def test_parts_of_the_keys_add_up(form: tuple[int, int, int, int, torch.dtype], split: int, window: int | None) -> None:
    batch = make_batch(form, LENGTHS, seed=split)
    items, slots = chunk_items(batch, window, split)
    rows = list(range(batch.q.shape[0]))
    _, partial_out, partial_lse = run_items(batch, items, rows, slots, window)
    assert not partial_out.isnan().any() and not partial_lse.isnan().any()
    unseen = partial_lse == -torch.inf
    assert (partial_out[unseen] == 0).all()
    check(combine(batch, items, rows, partial_out, partial_lse), batch.reference(window), form[4])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("count", [1, 4, 17, 300])
def test_rows_share_a_prefix(form: tuple[int, int, int, int, torch.dtype], count: int) -> None:
    """Scattered rows over one prefix: every other row of the batch, in falling order, behind each other in the items."""
    prefix = form[3] * 7
    batch = make_batch(form, [(2 * count, prefix)], seed=count)
    rows = list(range(2 * count - 1, 0, -2))
    items = [[i, min(TILE_ROWS, count - i), 0, 0, prefix, SEES_ALL, -1, 0] for i in range(0, count, TILE_ROWS)]
    out, *_ = run_items(batch, items, rows, 0)
    assert out[0::2].isnan().all(), "rows of no item were written"
    every = Batch(
        batch.q[rows], batch.k_cache, batch.v_cache, batch.tables.expand(count, -1), list(range(count + 1)), [prefix] * count
    )
    check(out[rows], every.reference(), form[4])
    slotted = [[*item[:6], item[0], 0] for item in items]
    _, partial_out, partial_lse = run_items(batch, slotted, rows, count)
    check(partial_out, every.reference(), torch.float16 if form[4] == torch.float16 else torch.bfloat16)
    keys = batch.k_cache[batch.tables[0, :7].long()].flatten(0, 1).double().repeat_interleave(form[1] // form[2], 1)
    scores = torch.einsum("rhd,khd->rhk", batch.q[rows].double(), keys) * batch.scale
    torch.testing.assert_close(partial_lse.double(), scores.logsumexp(2) / torch.tensor(2.0).log().item(), rtol=1e-3, atol=2e-3)


def test_many_tiles_with_and_without_large_scores() -> None:
    batch = make_batch((128, 4, 2, 16, torch.bfloat16), [(700, 2900), (1, 5000), (1500, 1500)])
    batch.q *= 8
    items, _ = chunk_items(batch)
    out, *_ = run_items(batch, items, list(range(batch.q.shape[0])), 0)
    check(out, batch.reference(), torch.bfloat16)


def test_a_row_that_overflows_spoils_no_other() -> None:
    batch = make_batch((128, 4, 2, 16, torch.bfloat16), [(200, 200), (300, 300), (90, 90)])
    expected = batch.reference()
    batch.q[0:200] = torch.nan
    items, _ = chunk_items(batch)
    out, *_ = run_items(batch, items, list(range(batch.q.shape[0])), 0)
    check(out[200:], expected[200:], torch.bfloat16)


def test_no_items() -> None:
    batch = make_batch(FORMS[0], [(3, 3)])
    out, *_ = run_items(batch, [], [0], 0)
    assert out.isnan().all()


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_replay_of_a_graph_reads_the_items_anew(form: tuple[int, int, int, int, torch.dtype]) -> None:
    load_kernels()
    batch = make_batch(form, LENGTHS)
    items, _ = chunk_items(batch)
    tiles = torch.zeros(len(items) + 20, 8, dtype=torch.int32, device="cuda")
    rows = torch.arange(batch.q.shape[0], dtype=torch.int32, device="cuda")
    out, none = torch.full(batch.q.shape, torch.nan, dtype=form[4], device="cuda"), torch.empty(0, device="cuda")

    def call() -> None:
        torch.ops.batchinfer.tile_attention(
            batch.q, batch.k_cache, batch.v_cache, batch.tables, tiles, rows, out, none, none, batch.scale, 0
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            call()
    graph.replay()
    assert out.isnan().all()
    tiles[: len(items)] = torch.tensor(items, dtype=torch.int32)
    batch.q.normal_()
    graph.replay()
    check(out, batch.reference(), form[4])


def test_the_same_twice() -> None:
    batch = make_batch(FORMS[1], LENGTHS)
    items, _ = chunk_items(batch)
    rows = list(range(batch.q.shape[0]))
    first, second = (run_items(batch, items, rows, 0)[0] for _ in range(2))
    assert torch.equal(first, second)
