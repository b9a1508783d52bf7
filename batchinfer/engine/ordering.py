"""In which order a window of prompts should reach the engine.

Prompts that begin alike go next to each other, so that the prefix cache still has what they share. That is all: long ones
first, the classic remedy for a long tail, was simulated and gains nothing here (`slurm/bench/simulate_scheduling.py`), since
a window is short against a run and a memory full of long sequences only preempts more.
"""

from __future__ import annotations

from collections.abc import Sequence

PIECE = 64  # tokens compared at a time: to share less than that is worth no detour


def order_window(prompts: Sequence[list[int]]) -> list[int]:
    """The indices of `prompts`, those with a common beginning together, the longer the closer; otherwise as they came.

    Depth first through the tree of the prompts' pieces, in which every branch stands where its first prompt came. Equal
    prompts, such as the samples of a row, stay in their order and next to each other. Nobody starves as long as a window is
    handed on in full before the next one is ordered.
    """
    order: list[int] = []
    branches = [(list(range(len(prompts))), 0)]  # prompts that are equal up to a position; the next one to visit is last
    while branches:
        branch, start = branches.pop()
        if len(branch) == 1 or all(len(prompts[i]) <= start for i in branch):
            order += branch
            continue
        pieces: dict[tuple[int, ...], list[int]] = {}
        for i in branch:
            pieces.setdefault(tuple(prompts[i][start : start + PIECE]), []).append(i)
        branches += [(indices, start + PIECE) for indices in reversed(pieces.values())]
    return order
