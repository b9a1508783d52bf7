"""One rank of `preflight.py`: what its GPU reaches, alone and with the others. Started by torchrun; rank 0 leaves the figures.

torchrun --standalone --nproc-per-node=2 slurm/preflight_devices.py cuda FIGURES.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from batchinfer.config import ConfigError
from batchinfer.model.parallel import TensorParallel, init_distributed
from batchinfer.ops.compiled import load_kernels

KIB, MIB = 1 << 10, 1 << 20
ALL_REDUCE_BYTES = {"cuda": (8 * KIB, 128 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB), "cpu": (8 * KIB, MIB)}
COPY_BYTES = 64 * MIB
WARM_UP, ROUNDS, IN_A_ROW = 3, 10, 10


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: the median of some rounds, in each of which the device is waited for once."""
    took = []
    for _ in range(WARM_UP + ROUNDS):
        begin = time.perf_counter()
        for _ in range(IN_A_ROW):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append((time.perf_counter() - begin) / IN_A_ROW)
    return statistics.median(took[WARM_UP:])


def all_reduces(parallel: TensorParallel, device: torch.device) -> tuple[list[tuple[int, float]], bool]:
    """(bytes, seconds) by size, and whether every sum was right."""
    figures, right = [], True
    for num_bytes in ALL_REDUCE_BYTES[device.type]:
        x = torch.full((num_bytes // 4,), float(parallel.rank + 1), device=device)
        parallel.all_reduce(x)
        right = right and bool((x == parallel.size * (parallel.size + 1) / 2).all())
        x.zero_()
        figures.append((num_bytes, seconds_of(lambda x=x: parallel.all_reduce(x), device)))  # type: ignore[misc]
    return figures, right


def copies(parallel: TensorParallel, device: torch.device) -> tuple[float, float]:
    """Bytes per second from pinned host memory to this rank's GPU: while the others wait, and while they do the same."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    alone = 0.0
    for rank in range(parallel.size):
        _meet(parallel)
        if rank == parallel.rank:
            alone = COPY_BYTES / seconds_of(copy, device)
    _meet(parallel)
    return alone, COPY_BYTES / seconds_of(copy, device)


def _meet(parallel: TensorParallel) -> None:
    if parallel.size > 1:
        dist.barrier(parallel.host_group)


def gathered(parallel: TensorParallel, value: Any) -> list[Any]:
    if parallel.size == 1:
        return [value]
    values: list[Any] = [None] * parallel.size
    dist.all_gather_object(values, value, group=parallel.host_group)
    return values


def kernels_missing() -> str | None:
    try:
        load_kernels()
    except ConfigError as error:
        return str(error)
    return None


def main(kind: str, file: Path) -> None:
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    parallel = init_distributed(device)
    found: dict[str, Any] = {}
    if parallel.size > 1:
        figures, right = all_reduces(parallel, device)
        found = {"all_reduce": figures, "right": all(gathered(parallel, right))}
    if kind == "cuda":
        found |= {"copies": gathered(parallel, copies(parallel, device)), "kernels_missing": kernels_missing()}
    if parallel.rank == 0:
        file.write_text(json.dumps(found))
    parallel.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
