"""Ranks of a test: processes with a GPU each, which meet as those of a replica do."""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from batchinfer.model.parallel import TensorParallel, init_distributed

TIMEOUT_S = 100  # after which a rank that hangs says where, and ends


def sizes() -> list[int]:
    """How many ranks this host has GPUs for."""
    return [size for size in (2, 4, 8) if size <= torch.cuda.device_count()]


def run_ranks(size: int, work: Callable[..., None], *args: Any) -> None:
    """`work(parallel, device, *args)` in `size` processes; what one raises is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (size, port, work, args), nprocs=size)


def _rank(rank: int, size: int, port: int, work: Callable[[TensorParallel, torch.device], None], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    parallel = init_distributed(device)
    work(parallel, device, *args)
    torch.cuda.synchronize(device)
    parallel.close()
