"""A death that would come again on every try, before its judge: is the request at fault, or this node?

It is the node where the same submission works anywhere else: then the job goes on elsewhere (`job.left_out`). Jobs of an array
begin together, so the judge waits while others are still on their way to where it shows. What is full is full for all.
"""

from __future__ import annotations

import enum
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from batchinfer.job.failure import Cause, Failure, cannot_write
from batchinfer.job.left_out import node_name, running_jobs
from batchinfer.job.replica import FULL, HOPELESS, Death, read_death, read_progress
from batchinfer.job.room import lasting_error, no_space
from batchinfer.job.rundir import RunDir

PATIENCE_S = 30.0  # for replicas that are starting or loading; who is still at it by then counts as working
LOOK_S = 0.5
OPEN = ("starting", "loading", "failed")  # the last: its job is about to say what comes of it
NOT_INSTALLED = re.compile(r"\b(ModuleNotFoundError|ImportError): ")
WORKED = ("running", "waiting", "done")


def examined(run_dir: RunDir, death: Death) -> Death:
    """What the rank could not say by its exit code. Where the run cannot be written any more, that is why, even if the log had no
    space for it; and what is not installed cannot even be started."""
    if death.exit_code <= 0 or death.exit_code == FULL:
        return death
    if error := lasting_error(run_dir.root):
        return replace(death, exit_code=FULL if no_space(error) else HOPELESS, reason=cannot_write(run_dir, error))
    return replace(death, exit_code=HOPELESS) if death.early and NOT_INSTALLED.search(death.reason) else death


def failure_of(deaths: Sequence[Death]) -> Failure:
    """What they come to for the submission."""
    death = next((death for death in deaths if death.exit_code == FULL), deaths[0])
    cause = Cause.DISK if death.exit_code == FULL else Cause.REQUEST
    return Failure(death.reason, cause, death.replica, death.node or node_name(), death.log)


class Verdict(enum.Enum):
    REQUEST = enum.auto()
    NODE = enum.auto()


class Inquiry:
    """Of the hopeless deaths on one node."""

    def __init__(self, run_dir: RunDir, submission: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._submission, self._clock = run_dir, submission, clock
        self._deadline = self._next_look = 0.0
        self.deaths: list[Death] = []

    def open(self, death: Death) -> None:
        """Its file is there already, if it can be written, so that other nodes take no account of this replica."""
        if not self.deaths:
            self._deadline = self._clock() + PATIENCE_S
        self.deaths.append(death)

    def judge(self) -> Verdict | None:
        """None: it does not show yet."""
        if any(death.exit_code == FULL for death in self.deaths):
            return Verdict.REQUEST
        now = self._clock()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        names = [name for name in os.listdir(self._run_dir.replicas) if name.startswith(f"{self._submission:02d}-")]
        judged = {death.replica for death in self.deaths}
        phases = {self._phase(name) for name in names if name not in judged and read_death(self._run_dir, name) is None}
        if not phases.isdisjoint(WORKED):
            return Verdict.NODE
        with_replicas = {int(name.split("-")[1]) for name in names}
        if phases.isdisjoint(OPEN) and with_replicas.issuperset(running_jobs()):
            return Verdict.REQUEST
        return Verdict.NODE if now >= self._deadline else None

    def _phase(self, name: str) -> str:
        return str(read_progress(self._run_dir, name).get("phase", "starting"))
