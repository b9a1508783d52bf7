"""Whether the ranks of a replica have parted: with `engine.check_ranks` they compare what must be the same on all of them.

Ranks hold the same bits after an all-reduce; only so do their decisions agree without asking. Where they do not, text goes
wrong long before anything fails. So in each step every rank hashes the batch it was given, the hidden states it ends with, and
the tokens it took over, and all compare the hashes, host to host. That waits for the device several times a step: it is for
finding a fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchinfer.engine.batch import Batch, BatchArrays
from batchinfer.model.parallel import TensorParallel


class RanksDiffer(RuntimeError):
    """One sentence: which step, which ranks, and what is different."""


class RankCheck:
    """All ranks call the same methods in the same order. RanksDiffer is raised on every rank when it is on one."""

    def __init__(self, parallel: TensorParallel) -> None:
        self._parallel = parallel
        self._step = -1  # as the engine counts

    def forward(self, batch: Batch, hidden: Tensor) -> None:
        """Begins a step: its batch, and the hidden states [T, hidden_size] of it."""
        self._step += 1
        self._compare("batches", {field.name: getattr(batch, field.name).tobytes() for field in fields(BatchArrays)})
        self._compare("hidden states", _by_row(hidden))

    def tokens(self, token_ids: Tensor) -> None:
        """The drawn tokens [N] that this rank feeds to its next step."""
        self._compare("drawn tokens", _by_row(token_ids.unsqueeze(1)))

    def _compare(self, what: str, parts: Mapping[str, bytes]) -> None:
        digests = [_digest(part) for part in parts.values()]
        wholes = self._gather(_digest(b"".join(digests)))
        others = [str(rank) for rank, whole in enumerate(wholes) if whole != wholes[0]]
        if not others:
            return
        seen = zip(parts, *self._gather(digests), strict=False)  # not strict: batches of other sizes have parted too
        first = next((name for name, *digests in seen if len(set(digests)) > 1), "how many there are")
        ranks = f"rank{'s' if len(others) > 1 else ''} {', '.join(others)}"
        raise RanksDiffer(f"step {self._step}: {what} of {ranks} differ from those of rank 0, first in {first}")

    def _gather(self, mine: Any) -> list[Any]:
        found = [mine] * self._parallel.size
        dist.all_gather_object(found, mine, group=self._parallel.host_group)
        return found


def _by_row(rows: Tensor) -> dict[str, bytes]:
    """The bits of each row."""
    bits = rows.contiguous().view(torch.uint8).cpu().numpy()
    return {f"row {i} of {len(bits)}": row.tobytes() for i, row in enumerate(bits)}


def _digest(part: bytes) -> bytes:
    return hashlib.blake2b(part, digest_size=16).digest()
