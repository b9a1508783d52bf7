"""What each rank of a replica leaves for its node: a few bytes that both have mapped, its Python stacks, and why it failed.

They lie in this host's memory and not in the run directory, because whoever watches for a stuck file system must not wait for it.
The folder is named in the environment of the ranks. A rank beats from the thread that does its work, never from one beside it.
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import json
import mmap
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from batchinfer.job.process import start_time
from batchinfer.publish import replace_bytes

FOLDER = "BATCHINFER_VITALS"
STACKS_SIGNAL = signal.SIGUSR1  # neither torchrun nor SLURM sends it
MEMORY = Path("/dev/shm")
LAYOUT = struct.Struct("<QQIi")  # beats, step, phase, pid
SIZE = 64
RANK_FILE = re.compile(r"rank(\d+)")
NAME = re.compile(r"batchinfer-vitals-(\d+)-(\d+)-(\d+)-.*")  # of the process that made it: PID namespace, PID, start time


class Phase(enum.IntEnum):
    """What a rank is doing, as far as it matters for how long that may take."""

    STARTING = 0  # importing, meeting the others
    LOADING = 1  # weights, the measuring of memory, graphs
    STEPPING = 2
    IDLE = 3  # rank 0: no row is ready; the beat is that of the thread that prepares them
    COMMITTING = 4  # rank 0: nothing goes on before a commit has ended
    FOLLOWING = 5  # other ranks: waiting for rank 0's next batch
    ENDING = 6


@dataclass(frozen=True)
class Reading:
    """A rank as it was found. `state`: the kernel's letter for its process; `bytes_read`: by it, from wherever."""

    rank: int
    beats: int
    step: int
    phase: Phase
    pid: int
    state: str = "S"
    bytes_read: int = 0


class Pulse:
    """A rank's own end. `beat` costs about a microsecond."""

    def __init__(self, memory: mmap.mmap | None = None, stacks: TextIO | None = None) -> None:
        """Without arguments it beats for nobody."""
        self._memory = memory or bytearray(SIZE)
        self._stacks = stacks  # kept open: a signal handler in C writes to it
        self._beats = 0
        self.step = 0
        self.phase = Phase.STARTING

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Pulse:
        """This process's pulse. From now on it answers STACKS_SIGNAL with the stacks of its threads: to its node, or to stderr
        when it was started by hand and nobody watches it."""
        folder, rank = environment.get(FOLDER), environment.get("RANK", "0")
        stacks = open(Path(folder) / f"stacks-rank{rank}.txt", "a") if folder else None  # noqa: SIM115
        faulthandler.register(STACKS_SIGNAL, stacks or sys.stderr, all_threads=True, chain=False)
        pulse = cls(_make(Path(folder) / f"rank{rank}") if folder else None, stacks)
        pulse.beat()
        return pulse

    def beat(self, phase: Phase | None = None, step: int | None = None) -> None:
        """Something went on: in this phase, in this step (the last ones' by default)."""
        self._beats += 1
        if phase is not None:
            self.phase = phase
        if step is not None:
            self.step = step
        LAYOUT.pack_into(self._memory, 0, self._beats, self.step, self.phase, os.getpid())


@dataclass(frozen=True)
class LastWord:
    """Why a rank failed, for when the disk that its log is on takes nothing any more."""

    exit_code: int
    sentence: str

    def leave(self, environment: Mapping[str, str] = os.environ) -> None:
        """For the node that started this rank, if one did."""
        if folder := environment.get(FOLDER):
            path = Path(folder) / f"word-rank{environment.get('RANK', '0')}.json"
            with contextlib.suppress(OSError):  # memory may be full as well
                replace_bytes(path, json.dumps([self.exit_code, self.sentence]).encode())


class Vitals:
    """The node's end, for one replica: a folder with what its ranks on this host left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ranks: dict[int, tuple[mmap.mmap, TextIO]] = {}  # kept open: systemd may clear a user's files out of memory

    @classmethod
    def make(cls) -> Vitals:
        remove_orphans()
        owner = f"{_namespace()}-{os.getpid()}-{start_time(os.getpid())}"
        return cls(Path(tempfile.mkdtemp(prefix=f"batchinfer-vitals-{owner}-", dir=_memory())))

    def read(self) -> list[Reading]:
        """The ranks that live, in order."""
        with contextlib.suppress(FileNotFoundError):
            for match in filter(None, map(RANK_FILE.fullmatch, os.listdir(self.folder))):
                if int(match[1]) not in self._ranks:
                    self._open(int(match[1]))
        readings = [_reading(rank, memory) for rank, (memory, _) in sorted(self._ranks.items())]
        return [reading for reading in readings if reading is not None]

    def stacks(self, rank: int) -> str:
        """All that a rank that was read has written when it was asked for its stacks."""
        _, file = self._ranks[rank]
        file.seek(0)
        return file.read()

    def last_word(self) -> LastWord | None:
        """Of the rank that had one first."""
        paths = sorted(self.folder.glob("word-rank*.json"), key=lambda path: path.stat().st_mtime_ns)
        return LastWord(*json.loads(paths[0].read_bytes())) if paths else None

    def _open(self, rank: int) -> None:
        with open(self.folder / f"rank{rank}", "rb") as file:
            if os.fstat(file.fileno()).st_size == SIZE:  # it has been made whole
                memory = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
                stacks = open(self.folder / f"stacks-rank{rank}.txt", errors="replace")  # noqa: SIM115
                self._ranks[rank] = memory, stacks

    def remove(self) -> None:
        for memory, stacks in self._ranks.values():
            memory.close()
            stacks.close()
        self._ranks.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_orphans() -> None:
    """Folders of nodes' processes that were killed."""
    for path in _memory().glob("batchinfer-vitals-*"):
        match = NAME.fullmatch(path.name)
        if match is not None and int(match[1]) == _namespace() and start_time(int(match[2])) != int(match[3]):
            shutil.rmtree(path, ignore_errors=True)  # another user's stays


def _memory() -> Path:
    return MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _make(path: Path) -> mmap.mmap:
    with open(path, "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)  # where memory is full this is an error, and writing would be SIGBUS
        return mmap.mmap(file.fileno(), SIZE)


def _reading(rank: int, memory: mmap.mmap) -> Reading | None:
    """None: the process is gone, or has not written yet."""
    beats, step, phase, pid = LAYOUT.unpack_from(memory)
    state = process_state(pid) if pid else None
    return None if state is None else Reading(rank, beats, step, Phase(phase), pid, state, _bytes_read(pid))


def process_state(pid: int) -> str | None:
    """R, S, D (waits in the kernel, cannot be interrupted), T (stopped by a signal), t (by a debugger); None: it is gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else state


def _bytes_read(pid: int) -> int:
    with contextlib.suppress(OSError):
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(fields["rchar"]) + int(fields["read_bytes"])  # by calls, and through mapped files
    return 0
