"""One replica over several nodes: how the nodes of its job find each other, and end together.

SLURM starts the same job on each node of an array element, one task a node. Node 0 leads: it owns the replica, and says in one
file, its *word*, which replica is at work and where its ranks meet. The others follow: each runs its part of the replica that
the word names, ends it when the word names it no more, and reports how it ended. So the death of a part anywhere ends the
replica, which its leader then starts again or gives up. Of a node that dies as a whole nothing is heard: SLURM ends and
requeues the element, and so it does when a task dies (`srun --kill-on-bad-exit`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchinfer.job.replica import FULL, HOPELESS, Death, Replica
from batchinfer.job.rundir import RunDir
from batchinfer.publish import replace_bytes

LISTEN_S = 0.5
REPORTS_S = 5.0  # for which a dead replica's leader waits to hear what the other nodes have to say


@dataclass(frozen=True)
class Word:
    """What the leader says. No replica: wait. `over`: there will be none."""

    replica: str | None = None
    host: str = ""
    port: int = 0
    over: bool = False


@dataclass(frozen=True)
class Report:
    """How a node's part of a replica ended; no reason: only because the replica did."""

    host: str
    exit_code: int | None
    reason: str | None


@dataclass(frozen=True)
class Span:
    """This process's place among the nodes of its job."""

    nodes: int
    node: int
    path: Path  # of the word

    @classmethod
    def here(cls, nodes: int, folder: Path, job: int) -> Span:
        """As SLURM says. A job that was requeued has a word of its own: the former one names a replica that is gone."""
        life = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(nodes, int(os.environ.get("SLURM_NODEID", "0")), folder / f"span-{job:02d}.{life}.json")

    def say(self, word: Word) -> None:
        replace_bytes(self.path, json.dumps(asdict(word)).encode())

    def hear(self) -> Word:
        try:
            return Word(**json.loads(self.path.read_bytes()))
        except FileNotFoundError:  # the leader has not begun
            return Word()

    def rendezvous(self, word: Word) -> list[str]:
        """What torchrun is told on this node: no node elects anything, so ranks go by the order of the nodes."""
        meeting = [f"--master-addr={word.host}", f"--master-port={word.port}"]
        return [f"--nnodes={self.nodes}", f"--node-rank={self.node}", *meeting]

    @property
    def log_name(self) -> str:
        return "log.txt" if self.node == 0 else f"log-node{self.node}.txt"


def call_together(replica: str) -> Word:
    """A place to meet on this node: a port that is free now, as the kernel gives them out."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return Word(replica, socket.gethostname(), probe.getsockname()[1])


class LeadingReplica(Replica):
    """The leader's part, which speaks for all: it has ended when any part has, and ends them all."""

    def __init__(
        self,
        span: Span,
        word: Word,
        run_dir: RunDir,
        submission: int,
        command: Sequence[str],
        env: Mapping[str, str],
        stall_timeout_s: float = math.inf,
    ) -> None:
        assert word.replica is not None
        self._span = span
        self._own_end: Report | None = None
        self._reports: dict[int, Report] = {}
        self._next_look = 0.0
        span.say(word)
        super().__init__(run_dir, submission, word.replica, command, env, stall_timeout_s=stall_timeout_s)

    def exit_code(self) -> int | None:
        if self._own_end is None and (code := super().exit_code()) is not None:
            self._own_end = Report(socket.gethostname(), code, self._reason(code) if code else None)
        if self._own_end is not None:
            return self._own_end.exit_code
        return next((report.exit_code for report in self._listen().values() if report.exit_code), None)

    def kill(self) -> None:
        self._span.say(Word())
        super().kill()

    def death(self, exit_code: int) -> Death:
        """With what every node has to say: which of them was the first cannot be told across their clocks."""
        deadline = time.monotonic() + REPORTS_S
        while len(self._listen(now=True)) < self._span.nodes - 1 and time.monotonic() < deadline:
            time.sleep(LISTEN_S)
        ends = [self._own_end, *(report for _, report in sorted(self._reports.items()))]
        told = "; ".join(f"{end.host}: {end.reason}" for end in ends if end is not None and end.reason)
        hopeless = (end.exit_code for end in ends if end is not None and end.exit_code in (HOPELESS, FULL))
        return Death(self.name, next(hopeless, None) or exit_code, told, str(self.log))

    def _listen(self, now: bool = False) -> dict[int, Report]:
        if now or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LISTEN_S
            for node in range(1, self._span.nodes):
                if node not in self._reports and (report := _read_report(self._run_dir, self.name, node)):
                    self._reports[node] = report
        return self._reports


def follow(span: Span, run_dir: RunDir, start: Callable[[Word], Replica]) -> None:
    """Another node than the first: runs its part of every replica that the leader names, until there will be none.

    Signals are the leader's business, who hears them too: its part stops in order, and this one ends with it.
    """
    part: Replica | None = None
    begun: set[str] = set()
    try:
        while not (word := span.hear()).over:
            if part is not None:
                part = _look_after(part, word, span, run_dir)
            elif word.replica is not None and word.replica not in begun:
                begun.add(word.replica)
                part = start(word)
            time.sleep(LISTEN_S)
    finally:
        if part is not None:
            part.kill()


def _look_after(part: Replica, word: Word, span: Span, run_dir: RunDir) -> Replica | None:
    """None: it has ended, by itself or because the leader wants it."""
    code = part.exit_code()
    if code is None and word.replica == part.name:
        return part
    if code is None:
        part.leave_stacks()
    part.kill()
    report = Report(socket.gethostname(), code, part.death(code).reason if code else None)
    with contextlib.suppress(OSError):  # a full disk: the leader finds out by itself
        replace_bytes(_report_path(run_dir, part.name, span.node), json.dumps(asdict(report)).encode())
    return None


def _report_path(run_dir: RunDir, replica: str, node: int) -> Path:
    return run_dir.replica(replica) / f"ended-node{node}.json"


def _read_report(run_dir: RunDir, replica: str, node: int) -> Report | None:
    try:
        raw: dict[str, Any] = json.loads(_report_path(run_dir, replica, node).read_bytes())
    except FileNotFoundError:
        return None
    return Report(**raw)
