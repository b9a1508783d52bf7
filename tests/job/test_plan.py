"""Units cover what they must, and plans of large inputs cost seconds and no torch."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.config import from_dict
from batchinfer.data.schema import Shard, Unit, num_rows
from batchinfer.job.plan import _most_replicas, cut_units


def shards(*rows: int) -> list[Shard]:
    return [Shard(f"{i:04d}.parquet", 1, count, "") for i, count in enumerate(rows)]


def sizes(units: Sequence[Unit]) -> list[int]:
    return [num_rows(unit) for unit in units]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 40), st.none() | st.integers(1, 400), st.integers(1, 9))
def test_every_row_below_the_limit_is_in_one_unit_in_order(
    rows: list[int], rows_per_unit: int, limit: int | None, replicas: int
) -> None:
    units = cut_units(shards(*rows), rows_per_unit, limit, replicas)
    covered = [(r.shard, row) for unit in units for r in unit for row in range(r.start, r.stop)]
    assert covered == [(shard, row) for shard, count in enumerate(rows) for row in range(count)][:limit]
    assert all(0 < size <= rows_per_unit for size in sizes(units))
    assert all(r.start < r.stop for unit in units for r in unit)
    assert units == cut_units(shards(*rows), rows_per_unit, limit, replicas)


def test_a_shard_of_about_a_unit_is_a_unit() -> None:
    units = cut_units(shards(*[1000] * 20), 1024, None)
    assert all(len(unit) == 1 for unit in units[:15]) and sizes(units)[:15] == [1000] * 15


def test_tiny_shards_share_units() -> None:
    units = cut_units(shards(*[3] * 1000), 300, None)
    assert sizes(units)[:5] == [300] * 5 and len(units[0]) == 100


def test_a_tail_of_small_units_comes_last() -> None:
    found = sizes(cut_units(shards(100_000), 1024, None))
    assert found[:90] == [1024] * 90 and found == sorted(found, reverse=True)
    assert 0 < found[-1] <= 128 and found[-2] == 128  # an eighth
    assert sum(size for size in found if size < 1024) < 5 * 1024


def idle_rows(found: Sequence[int], replicas: int) -> int:
    """From the first replica that finds no unit to the end, where each claims the next as soon as it is done with the last, and
    all take the same time for a row."""
    ends = [0] * replicas
    for size in found:
        heapq.heapreplace(ends, ends[0] + size)
    return max(ends) - min(ends)


@pytest.mark.parametrize("replicas", [1, 3, 8, 32, 100])
@pytest.mark.parametrize("rows", [[100_000], [1000] * 100, [37] * 2703])
def test_replicas_finish_together(replicas: int, rows: list[int]) -> None:
    """Within a smallest unit of each other, and not within one of 1,024 rows."""
    found = sizes(cut_units(shards(*rows), 1024, None, replicas))
    assert idle_rows(found, replicas) <= 128
    assert len(found) < 800, "most are large as long as there is much"


def test_replicas_are_counted_before_the_layout_is_known() -> None:
    def most(**hw: Any) -> int:
        checked = {"model": {"path": "m"}, "input": {"paths": ["in"], "prompt_column": "p"}, "launcher": {"nodes": 4}}
        return _most_replicas(from_dict({**checked, "hw": {"gpu": "h200", "gpus_per_node": 8, **hw}}))

    assert most() == most(tensor_parallel=1) == 32
    assert most(tensor_parallel=4) == 8
    assert most(nodes_per_replica=2) == 2


def test_nothing_to_do_is_no_unit() -> None:
    assert cut_units([], 10, None) == () and cut_units(shards(0, 0), 10, 5) == ()


class CountedVisits(list[Shard]):
    """Shards that count how often any of them is looked at."""

    visits = 0

    def __iter__(self) -> Iterator[Shard]:
        for shard in super().__iter__():
            self.visits += 1
            yield shard

    def __getitem__(self, index: Any) -> Any:
        self.visits += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [1000, 20_000])
def test_cutting_is_linear(count: int) -> None:
    visited = CountedVisits(shards(*[100_000 // count] * count))
    units = cut_units(visited, 1024, None)
    assert sum(sizes(units)) == 100_000 and visited.visits == 2 * count
