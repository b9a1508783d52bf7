"""How the processes of a replica start, are found again, and end together. Linux only: prctl, sessions, /proc.

torchrun puts every rank in a session of its own, so no process group holds a replica together. What does is a mark in the
environment, which every descendant inherits whatever it does to its group or parent. Run as a program, this module is the
first thing that a replica's process does: it ties its life to its parent's, ignores SIGUSR2 (which SLURM sends to every
descendant of a job, and which kills by default), and becomes the command it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

MARK = "BATCHINFER_PROCESS_MARK"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def die_with_parent(parent: int | None = None, death_signal: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `death_signal` when its parent dies, however that happens.

    `parent`: the pid that the parent is known to have; when it is gone already, this process ends itself at once. The
    tie survives exec, is not inherited by children, and hangs on the parent's *thread* that started this process.
    """
    expected = os.getppid() if parent is None else parent
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:  # it died before the tie was made
        os.kill(os.getpid(), death_signal)


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is gone or only a zombie is left of it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name in brackets may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether this very process lives: the pid may belong to somebody else by now."""
    return start_time(pid) == started


def marked(prefix: str) -> list[int]:
    """Living processes whose mark begins so. Other users' processes cannot be read and are never ours."""
    wanted = f"{MARK}={prefix}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if any(entry.startswith(wanted) for entry in file.read().split(b"\0")):
                    found.append(int(name))
    return [pid for pid in found if start_time(pid) is not None]


def kill_marked(prefix: str, timeout_s: float = 10.0) -> list[int]:
    """SIGKILL until nobody with the mark is left. Returns who would not die (uninterruptible in the kernel): normally nobody."""
    deadline = time.monotonic() + timeout_s
    while (pids := marked(prefix)) and time.monotonic() < deadline:
        for pid in pids:
            send(pid, signal.SIGKILL)
        time.sleep(0.02)
    return pids


def send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


@dataclass
class SignalNotes:
    """Notes signals instead of acting on them, while it is entered (in the main thread): a handler only counts.

    `previous` are the handlers found; under submitit the one for SIGUSR2 checkpoints, requeues and exits.
    """

    stops: list[int] = field(default_factory=list)
    warnings: int = 0  # SIGUSR2: SLURM's or submitit's warning before a time limit or a preemption
    previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> SignalNotes:
        for signum in (*STOP_SIGNALS, signal.SIGUSR2):
            previous = signal.getsignal(signum)
            if signum == signal.SIGUSR2 or previous is not signal.SIG_IGN:  # nohup and the launcher mean their SIG_IGN
                self.previous[signum] = previous
                signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, previous in self.previous.items():
            signal.signal(signum, previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGUSR2:
            self.warnings += 1
        else:
            self.stops.append(signum)

    @property
    def stop_asked(self) -> bool:
        return bool(self.stops) or self.warnings > 0

    @property
    def kill_asked(self) -> bool:
        """A second Ctrl-C."""
        return self.stops.count(signal.SIGINT) > 1


def command_of_child(command: Sequence[str], setup: Sequence[str] = ()) -> list[str]:
    """`command` tied to this process, after the shell lines of `setup`, whose environment it inherits."""
    shell = ["bash", "-c", "\n".join(["set -e", *setup, 'exec "$@"']), "setup"] if setup else []
    return [sys.executable, "-m", "batchinfer.job.process", str(os.getpid()), *shell, *command]


def main(argv: Sequence[str]) -> None:
    die_with_parent(int(argv[0]))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})  # the starter blocked it until here
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)  # whatever was ignored above, a replica can be told to stop
    os.execvp(argv[1], list(argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
