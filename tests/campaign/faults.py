"""What may befall a run, a function for each kind; each takes back what it did, as somebody on a cluster would in the end.

A *blow* strikes a job at work, and says whether it hit one. *Leavings* are found by the next one. *Surroundings* are what a
job meets from its start.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.run.jobs import kill, processes_of

WORKER = "-u -m batchinfer.worker"
MIB = 1 << 20


class Site:
    """Where a campaign takes place: a file system of its own for runs where that can be, and the inputs."""

    def __init__(self, folder: Path):
        self.inputs, self.disk = folder / "inputs", folder / "disk"
        self.disk.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(self.disk)]
        self.is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        self.run_dir = self.disk / "run"

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)


Blow = Callable[[Site, random.Random], contextlib.AbstractContextManager[bool]]


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Waits for it at most so long. Whether it came to pass."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def workers(site: Site) -> list[int]:
    """Ranks that live."""
    return sorted(pid for pid, command in processes_of(site.run_dir).items() if WORKER in command)


@contextlib.contextmanager
def kill_any(site: Site, dice: random.Random) -> Iterator[bool]:
    """SIGKILL to one process of the job, whichever it is, or to all of them at once."""
    pids = sorted(processes_of(site.run_dir))
    kill(pids if dice.random() < 0.4 else dice.sample(pids, min(1, len(pids))))
    yield bool(pids)


@contextlib.contextmanager
def stop_a_rank(site: Site, dice: random.Random) -> Iterator[bool]:
    """SIGSTOP to a rank: it stands still as in a hung collective, until the watchdog has ended it."""
    has_hit = False
    for pid in dice.sample(found := workers(site), min(1, len(found))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            has_hit = until(lambda pid=pid: pid not in processes_of(site.run_dir), 30)
    yield has_hit


@contextlib.contextmanager
def fill_the_disk(site: Site, dice: random.Random) -> Iterator[bool]:
    """To the last byte, as another user would; and room is made when the job has found out."""
    ballast, is_at_work = site.disk / "ballast", bool(workers(site))
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    until(lambda: not processes_of(site.run_dir), 20)
    yield is_at_work
    ballast.unlink()


@contextlib.contextmanager
def write_protect(site: Site, dice: random.Random) -> Iterator[bool]:
    """A folder of the run is mounted over itself, read-only, since a file system with open files does not become so."""
    folder = site.run_dir / dice.choice(["completions", "claims", "stats"])
    is_there, is_at_work = folder.is_dir(), bool(workers(site))
    if is_there:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        protect = ["mount", "-o", "remount,bind,ro", folder]  # refused in the moments in which somebody is writing there
        assert until(lambda: subprocess.run(protect, capture_output=True).returncode == 0, 20), "it stays writable"
        until(lambda: not processes_of(site.run_dir), 20)
    yield is_there and is_at_work
    if is_there:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def corrupt_a_shard(site: Site, dice: random.Random) -> Iterator[bool]:
    """Bytes of an input are overwritten, and later restored from a backup, with the time of the file."""
    shard, is_at_work = dice.choice(sorted(site.inputs.iterdir())), bool(workers(site))
    before, times = shard.read_bytes(), shard.stat()
    start = dice.randrange(4, len(before) // 2)
    damaged = before[:start] + dice.randbytes(len(before) // 2) + before[start + len(before) // 2 :]
    shard.write_bytes(damaged[: dice.choice([len(before), len(before) // 2])])
    until(lambda: not processes_of(site.run_dir), 5)
    yield is_at_work
    shard.write_bytes(before)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


BLOWS: dict[str, Blow] = {
    "kill -9": kill_any,
    "SIGSTOP of a rank": stop_a_rank,
    "disk full": fill_the_disk,
    "read-only folder": write_protect,
    "corrupt shard": corrupt_a_shard,
}
NEED_A_MOUNT = ("disk full", "read-only folder")


def leave_torn_files(site: Site, dice: random.Random) -> bool:
    """What writers that were cut off leave, and what a file system loses that had not yet written what it promised. Whether there
    were claims or partials to be torn."""
    completions, claims = site.run_dir / "completions", site.run_dir / "claims"
    for folder in (completions, claims, site.run_dir / "partials"):
        name = f".{dice.randrange(20):06d}.0.parquet.{dice.choice(['here', 'elsewhere'])}-7-{dice.getrandbits(32):08x}.tmp"
        (folder / name).write_bytes(dice.randbytes(dice.randrange(200)))
    held = sorted(claims.glob("[0-9]*.json")) + sorted(site.run_dir.glob("partials/[0-9]*.parquet"))
    for path in dice.sample(held, min(4, len(held))):
        os.truncate(path, dice.randrange(path.stat().st_size + 1))
    for path in site.run_dir.glob("replicas/*/progress.json"):
        os.truncate(path, dice.randrange(path.stat().st_size + 1))
    return bool(held)


def leave_a_torn_commit(site: Site, dice: random.Random) -> str | None:
    """A committed file that lost its end, or some bytes. The name; somebody has to remove it."""
    committed = sorted((site.run_dir / "completions").glob("[0-9]*.parquet"))
    if not committed:
        return None
    path = dice.choice(committed)
    data = bytearray(path.read_bytes())
    at = dice.randrange(len(data))
    damaged = bytes(data[:at]) if dice.random() < 0.5 else bytes(data[:at]) + bytes([data[at] ^ 0x55]) + bytes(data[at + 1 :])
    path.unlink()  # another file in its place: nobody reads this one halfway
    path.write_bytes(damaged)
    return path.name


TORN_FILES, TORN_COMMIT = "torn files", "torn commit"
CLOCK, SLOW_FILES, TWO_INVOCATIONS = "clock skew", "slow file system", "two invocations"
SURROUNDINGS = (CLOCK, SLOW_FILES, TWO_INVOCATIONS)
LEAVINGS = (TORN_FILES, TORN_COMMIT)
KINDS = (*BLOWS, *LEAVINGS, *SURROUNDINGS)


def surroundings(kinds: list[str], dice: random.Random) -> list[dict[str, str]]:
    """For each invocation, what its processes find in their environment (tests/run/host); clocks differ between two."""
    found: list[dict[str, str]] = [{} for _ in range(2 if {CLOCK, TWO_INVOCATIONS} & set(kinds) else 1)]
    if CLOCK in kinds:
        for variables, off in zip(found, dice.sample([-86400.0, -3600.0, -5.0, 5.0, 3600.0, 86400.0], 2), strict=True):
            variables["CLOCK_IS_OFF_BY"] = str(off)
    if SLOW_FILES in kinds:
        for variables in found:
            variables["FILES_TAKE"] = "0.005"
    return found
