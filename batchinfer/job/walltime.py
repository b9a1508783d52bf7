"""When a job must end, and how the time before that is shared out. Its replicas are told only until when they may work.

A warning near the end is about the time limit, which the replicas know of; any other is about a preemption, whose grace time
nobody tells.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

WORK_UNTIL = "BATCHINFER_WORK_UNTIL"  # environment of a replica: seconds since the Unix epoch, on this host's clock
RESERVE_S = 40.0  # at most: for the last step, commits, partials, and to be put back into the queue
EARLY_S = 90.0  # slurmctld signals up to a minute early (sbatch(1), --signal), and we may have begun late
TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")  # squeue's %L: days-hours:minutes:seconds


@dataclass(frozen=True)
class Walltime:
    """`ends`: seconds since the Unix epoch, inf: nobody knows of an end. `warning_s`: how long before that the warning comes."""

    ends: float
    warning_s: float

    @classmethod
    def of_this_job(cls, limit_s: float | None, warning_s: float, environ: Mapping[str, str] = os.environ) -> Walltime:
        """Of a job that begins now: the sooner of its own limit and of the SLURM allocation that it is in."""
        ends = math.inf if limit_s is None else time.time() + limit_s
        return cls(min(ends, _slurm_end(environ)), warning_s)

    @property
    def left_s(self) -> float:
        return self.ends - time.time()

    @property
    def work_until(self) -> float:
        """When replicas stop by themselves."""
        return self.ends - self._reserve_s

    @property
    def is_over(self) -> bool:
        """Whether replicas that still work must be stopped."""
        return self.left_s < self._reserve_s / 2

    @property
    def _reserve_s(self) -> float:
        return min(RESERVE_S, self.warning_s / 2)

    def explains_warning(self) -> bool:
        """Whether a warning that comes now is about this end."""
        return self.left_s <= self.warning_s + EARLY_S


def _slurm_end(environ: Mapping[str, str]) -> float:
    """By the environment where SLURM sets it (23.02 and later), else by squeue; inf outside of SLURM or when nobody can say."""
    if "SLURM_JOB_ID" not in environ:
        return math.inf
    if environ.get("SLURM_JOB_END_TIME", "").isdecimal():
        return float(environ["SLURM_JOB_END_TIME"])
    try:
        command = ["squeue", "-h", "-j", environ["SLURM_JOB_ID"], "-o", "%L"]
        left = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return math.inf
    return time.time() + seconds_left(left)


def seconds_left(text: str) -> float:
    """What squeue says is left of a time limit; inf for UNLIMITED, NOT_SET and the like."""
    match = TIME_LEFT.fullmatch(text.strip())
    if match is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
