"""Killing one rank of a running replica, and waiting for what comes next."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from batchinfer.data.writer import read_footer
from tests.run.jobs import processes_of

T = TypeVar("T")


def eventually(look: Callable[[], T | None], seconds: float) -> T:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


def rank_of(run_dir: Path, replica: str, rank: int) -> int | None:
    """The process of a rank: torchrun tells it by its environment."""
    for pid, command in processes_of(run_dir).items():
        if f"-u -m batchinfer.worker {run_dir} --replica {replica} " in command:
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if f"RANK={rank}".encode() in environment:
                return pid
    return None


def has_committed(run_dir: Path, replica: str) -> bool:
    return any(read_footer(path).replica == replica for path in (run_dir / "completions").glob("[0-9]*.parquet"))


def kill_rank(rank: int, run_dir: Path, replica: str, following: str) -> float:
    """SIGKILL while the replica steps without a pause. Returns seconds until the fresh replica is started."""
    eventually(lambda: has_committed(run_dir, replica), 60)
    pid = rank_of(run_dir, replica, rank)
    assert pid is not None, "the run is over"
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    eventually((run_dir / "replicas" / following).exists, 60)
    return time.monotonic() - begin
