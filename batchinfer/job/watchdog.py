"""The watchdog of a replica on its node: one that stands still is killed within a set time, and it is told where it stood.

It runs in a thread of the node's process and touches nothing but memory of this host and /proc, so that no stuck file system
holds it up. What it finds is told by the job's loop, which sees the replica end.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.job.process import kill_marked, marked, send
from batchinfer.job.vitals import STACKS_SIGNAL, Phase, Reading, Vitals, process_state

LOOK_S = 0.5
LONGEST_LOOK_S = 1.0  # of the time between two looks counts: what is more, this process did not run itself
SLOW_TIMES = 6  # as patient where nothing can beat: imports, the measuring of memory, the capture of graphs
STACKS_S = 3.0  # for which ranks may write their stacks
READ_STEP = 1 << 20  # bytes: a rank that reads so many is not standing still
READING = (Phase.STARTING, Phase.LOADING, Phase.COMMITTING)  # the last waits for the hash over the weights, too
AHEAD = 2  # steps by which ranks that wait for each other can be apart
OWN_FRAME = re.compile(r'^  File "[^"]*/(batchinfer/[^"]+)", line (\d+) in (.+)$', re.MULTILINE)
THREADS = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)
DOING = {
    Phase.STARTING: "starting",
    Phase.LOADING: "loading",
    Phase.STEPPING: "in step {step}",
    Phase.IDLE: "waiting for rows after step {step}",
    Phase.COMMITTING: "waiting for a commit after step {step}",
    Phase.FOLLOWING: "waiting for a batch after step {step}",
    Phase.ENDING: "ending",
}
ENTRY = {Phase.IDLE: "batchinfer/worker/source.py", Phase.COMMITTING: "batchinfer/worker/sink.py"}  # whom rank 0 waits for


@dataclass(frozen=True)
class Still:
    """A rank that stood still for so many seconds."""

    reading: Reading
    seconds: float


class Stillness:
    """Which ranks have stood still for longer than they may. Time counts only while somebody looks."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self._timeout_s, self._last = timeout_s, now
        self._watched_s = 0.0
        self._signs: dict[int | None, tuple[object, float]] = {}  # of a rank: its last sign of life, and when it came
        self.longest_s = 0.0  # that one of them has stood still by now

    def look(self, now: float, readings: Sequence[Reading]) -> list[Still] | None:
        """The ranks that do not move, when one of them has not for too long. None: all is well. Empty: no rank ever came up."""
        self._watched_s += min(now - self._last, LONGEST_LOOK_S)
        self._last = now
        still = [Still(reading, self._since(reading.rank, _sign(reading))) for reading in readings]
        self.longest_s = max((s.seconds for s in still), default=0.0)
        if any(s.seconds >= self._patience(s.reading.phase) for s in still):
            return [s for s in still if s.seconds >= self._timeout_s / 2]
        nobody_s = self._since(None, bool(readings))
        return [] if not readings and nobody_s >= SLOW_TIMES * self._timeout_s else None

    def _since(self, rank: int | None, sign: object) -> float:
        if rank not in self._signs or self._signs[rank][0] != sign:
            self._signs[rank] = (sign, self._watched_s)
        return self._watched_s - self._signs[rank][1]

    def _patience(self, phase: Phase) -> float:
        if phase is Phase.FOLLOWING:
            return float("inf")  # rank 0 has to move
        return self._timeout_s * (SLOW_TIMES if phase in (Phase.STARTING, Phase.LOADING) else 1)


def _sign(reading: Reading) -> object:
    return reading.pid, reading.beats, reading.phase, reading.bytes_read // READ_STEP if reading.phase in READING else 0


class Watchdog:
    """Watches the ranks of one replica, and kills all of it when one stands still. `verdict` is then what to say of it."""

    def __init__(self, vitals: Vitals, mark: str, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._vitals, self._mark, self._clock = vitals, mark, clock
        self._timeout_s, self._stillness = timeout_s, Stillness(timeout_s, clock())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.verdict: str | None = None
        self.stacks: dict[int, str] = {}  # by rank

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def ask(self) -> None:
        """It is about to be ended because a rank on another node stands still. Those here may do so as well: then, where?"""
        self.close()
        if self._stillness.longest_s >= self._timeout_s / 2:
            self.stacks = gather_stacks(self._vitals, self._mark, self._vitals.read())

    def _run(self) -> None:
        while not self._over.wait(LOOK_S):
            still = self._stillness.look(self._clock(), self._vitals.read())
            if still is not None:
                self._end(still)
                return

    def _end(self, still: Sequence[Still]) -> None:
        everybody = self._vitals.read()
        states = {reading.rank: reading.state for reading in everybody}  # as it was: stacks are only there of who can run
        self.stacks = gather_stacks(self._vitals, self._mark, everybody)
        self.verdict = verdict(still, states, self.stacks)
        if left := kill_marked(self._mark):
            print(f"processes {left} do not die (stuck in the kernel?)", file=sys.stderr, flush=True)


def gather_stacks(vitals: Vitals, mark: str, readings: Sequence[Reading]) -> dict[int, str]:
    """What every rank's threads are doing; of a process that cannot say it, what the kernel says."""
    for pid in marked(mark):
        send(pid, signal.SIGCONT)
    for reading in readings:
        send(reading.pid, STACKS_SIGNAL)
    deadline, told = time.monotonic() + STACKS_S, 0
    while time.monotonic() < deadline:
        time.sleep(0.1)
        sizes = [len(vitals.stacks(reading.rank)) for reading in readings]
        if all(sizes) and sum(sizes) == told:
            break
        told = sum(sizes)
    return {reading.rank: vitals.stacks(reading.rank) or kernel_view(reading.pid) for reading in readings}


def kernel_view(pid: int) -> str:
    """Name, state and place in the kernel of each thread, where this user may see them."""
    lines = [f"Process {pid} wrote no stacks. Its threads, and where they wait in the kernel:"]
    try:
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            name, place = ((task / file).read_text(errors="replace").strip() for file in ("comm", "wchan"))
            lines.append(f"  {task.name} {name}: {process_state(int(task.name))} {place}")
    except OSError as error:
        lines.append(f"  {error.strerror}")
    return "\n".join(lines) + "\n"


def verdict(still: Sequence[Still], states: dict[int, str], stacks: dict[int, str]) -> str:
    """Which ranks stood still, in which step, for how long, and where."""
    if not still:
        return "no rank came up in time"
    blamed = culprits(still, states)
    told = [_rank_told(s.reading, states.get(s.reading.rank, ""), stacks.get(s.reading.rank, "")) for s in blamed]
    return f"stood still for {max(s.seconds for s in blamed):.0f} s: {', '.join(told)}"


def culprits(still: Sequence[Still], states: dict[int, str]) -> list[Still]:
    """Those that cannot run; else those that are behind the others; else all: ranks wait for each other in every layer."""
    stuck = [s for s in still if states.get(s.reading.rank, "") in ("T", "t", "D")]
    if stuck:
        return stuck
    first = min(s.reading.step for s in still)
    if any(s.reading.step >= first + AHEAD for s in still):
        return [s for s in still if s.reading.step < first + AHEAD]
    return [s for s in still if s.reading.phase is not Phase.FOLLOWING]


def _rank_told(reading: Reading, state: str, stacks: str) -> str:
    why = {"T": " (stopped by a signal)", "t": " (stopped by a debugger)", "D": " (waits in the kernel)"}.get(state, "")
    place = innermost(stacks, ENTRY.get(reading.phase))
    where = DOING[reading.phase].format(step=reading.step)
    return f"rank {reading.rank} {where}{why}{f' at {place}' if place else ''}"


def innermost(stacks: str, entry: str | None = None) -> str | None:
    """The innermost frame of this package, of the last stacks told: in the thread that `entry`, a file, is part of, else in the
    main one."""
    threads = THREADS.split(stacks)[1:]
    named = [thread for thread in threads if entry is not None and entry in thread and "threading.py" in thread]
    for thread in [*named[-1:], *reversed(threads)]:  # the main thread is told last
        if (match := OWN_FRAME.search(thread)) is not None:
            return f"{match[1]}:{match[2]} in {match[3]}"
    return None
