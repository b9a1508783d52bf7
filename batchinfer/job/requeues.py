"""How often the jobs of a submission were put back into the queue, by whomever: a file for each start of a job.

Counted at the start, a requeue by SLURM itself (after a preemption, a lost node, `scontrol requeue`) is one like our own.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

from batchinfer.publish import Published, publish_bytes

START = re.compile(r"job-(\d+)-start-(\d+)\.json")


def record_start(folder: Path, job: int) -> None:
    """`folder`: the submission's."""
    record = {"host": socket.gethostname(), "time": time.time(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    number = sum(started == job for started in _starts(folder))
    while publish_bytes(folder / f"job-{job:02d}-start-{number:03d}.json", json.dumps(record).encode()) is Published.LOST:
        number += 1


def count_requeues(folder: Path) -> int:
    """Of all jobs of the submission together."""
    starts = _starts(folder)
    return len(starts) - len(set(starts))


def _starts(folder: Path) -> list[int]:
    """The job of every start."""
    return [int(match[1]) for match in map(START.fullmatch, os.listdir(folder)) if match]
