"""The order of the tests."""

from __future__ import annotations

import itertools

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the cluster wait for most of their time: spread among the other files, they wait while others are busy."""
    waiting = [item for item in items if "cluster" in getattr(item, "fixturenames", ())]
    busy = [item for item in items if item not in set(waiting)]
    files = [list(group) for _, group in itertools.groupby(busy, key=lambda item: item.path)]
    if files:
        for number, item in enumerate(waiting):
            files[number * len(files) // len(waiting)].append(item)
        items[:] = itertools.chain.from_iterable(files)
