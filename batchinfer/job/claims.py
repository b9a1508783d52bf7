"""Who works on which unit: claim files with epochs, and when a holder counts as lost.

Claims only save work. Two replicas on one unit waste time, and `publish` still lets only one of them commit, so every rule
here may err towards giving a unit away, and none may leave it with nobody for ever. A unit's claim is the file of its highest
epoch: epoch 0 is the first holder; taking over and giving back both publish epoch + 1, which only one caller can win.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.job.process import boot_id, start_time
from batchinfer.job.rundir import RunDir, parse_claim
from batchinfer.publish import Published, publish_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """A replica's process, so exactly that another process of the same host can tell whether it is still there."""

    replica: str
    host: str
    pid: int
    started: int  # clock ticks since boot: a later process with the same pid has another one
    boot: str
    pid_namespace: str

    @classmethod
    def here(cls, replica: str) -> Identity:
        pid = os.getpid()
        started = start_time(pid)
        assert started is not None, "this process is alive"
        return cls(replica, socket.gethostname(), pid, started, boot_id(), os.readlink("/proc/self/ns/pid"))

    def is_dead_beside(self, observer: Identity) -> bool:
        """Whether the process is surely gone, as far as `observer` can see: only on the same boot of the same host."""
        same_place = (self.host, self.boot, self.pid_namespace) == (observer.host, observer.boot, observer.pid_namespace)
        return same_place and start_time(self.pid) != self.started and not _is_hidden(self.pid)


UNKNOWN = Identity("", "", 0, 0, "", "")  # holder of a claim file that something else has damaged


class ClaimBoard:
    """One replica's view of the claims of a run. Remembers what cannot change: done units, who wrote a claim file."""

    def __init__(
        self,
        run_dir: RunDir,
        num_units: int,
        identity: Identity,
        stall_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        goals: Mapping[int, int] | None = None,
        doubtful: Collection[int] = (),
    ):
        """`goals`: the generation of a unit that makes it done, where it is not 0 (a retry). `doubtful` units are taken first
        when their holder is lost: they may be why, and the sooner that is known the better."""
        self._run_dir, self._identity = run_dir, identity
        self._stall_timeout_s, self._clock = stall_timeout_s, clock
        self._pending = list(range(num_units))
        self._goals = dict.fromkeys(self._pending, 0) | dict(goals or {})
        self._doubtful = frozenset(doubtful)
        self._epochs: dict[int, int] = {}  # highest epoch of every unit that was ever claimed
        self._held: dict[int, int] = {}  # unit -> epoch of our claim
        self._holders: dict[tuple[int, int], Identity | None] = {}  # (unit, epoch) -> who; None: given back
        self._beats: dict[str, tuple[int | None, float]] = {}  # replica -> heartbeat, and our clock when we first saw it

    def claim(self) -> int | None:
        """A unit that nobody holds and nobody has done, lowest number first; then those of lost holders (doubtful ones before
        all). None: nothing now.

        Costs one listing of completions/ and one of claims/, and reads each claim file at most once.
        """
        self._list_claims()
        self._list_completions()
        for find in (self._lost_doubtful_units, self._free_units, self._lost_units):
            for unit in find():
                in_work = unit in self._held  # taken from us when we stood still, and lost again since: renewed, not begun anew
                if self._take(unit) and not in_work:
                    return unit
        return None

    def release(self, unit: int) -> None:
        """Give an unfinished unit back. Does nothing when somebody took it over, or when it is not ours."""
        epoch = self._held.pop(unit, None)
        if epoch is not None:
            publish_bytes(self._run_dir.claim(unit, epoch + 1), _claim_json(None))

    def epoch(self, unit: int) -> int:
        """The epoch of our claim. KeyError: it is not ours."""
        return self._held[unit]

    def holds(self, unit: int) -> bool:
        """Whether our claim still stands. Asks the file system."""
        return unit in self._held and not self._run_dir.claim(unit, self._held[unit] + 1).exists()

    def held(self) -> list[int]:
        """Our claims that still stand, on units that are not done."""
        self._list_completions()
        return [unit for unit in self._pending if self.holds(unit)]

    def finished(self) -> bool:
        return not self.pending()

    def pending(self) -> list[int]:
        """Units that are not done, whoever holds them."""
        if self._pending:
            self._list_completions()
        return list(self._pending)

    def _list_completions(self) -> None:
        done = self._run_dir.done_units()
        self._pending = [unit for unit in self._pending if done.get(unit, -1) < self._goals[unit]]
        self._held = {unit: epoch for unit, epoch in self._held.items() if done.get(unit, -1) < self._goals[unit]}

    def _list_claims(self) -> None:
        for name in os.listdir(self._run_dir.claims):
            parsed = parse_claim(name)
            if parsed is not None:
                self._epochs[parsed[0]] = max(parsed[1], self._epochs.get(parsed[0], 0))

    def _free_units(self) -> Iterator[int]:
        """Never claimed, given back, or claimed for a generation before. Where there was none, epoch 0 is neither, so a long list
        of first claims is not read at all."""
        for unit in self._pending:
            epoch = self._epochs.get(unit)
            if epoch is None or (epoch + self._goals[unit] > 0 and self._holder(unit, epoch) is None):
                yield unit

    def _lost_doubtful_units(self) -> Iterator[int]:
        return self._lost(unit for unit in self._pending if unit in self._doubtful and unit in self._epochs)

    def _lost_units(self) -> Iterator[int]:
        return self._lost(self._pending)

    def _lost(self, units: Iterable[int]) -> Iterator[int]:
        lost: dict[str, bool] = {}  # by replica, so that each heartbeat is read once
        for unit in units:
            if unit in self._held and self._held[unit] == self._epochs[unit]:
                continue
            holder = self._holder(unit, self._epochs[unit])
            if holder is None:  # given back, and another replica was faster to take it
                continue
            if holder.replica not in lost:
                lost[holder.replica] = self._is_lost(holder)
            # What a dead process had committed is visible by now, and may be newer than our listing.
            if lost[holder.replica] and not self._run_dir.completion(unit, self._goals[unit]).exists():
                yield unit

    def _take(self, unit: int) -> bool:
        epoch = self._epochs.get(unit, -1) + 1
        path = self._run_dir.claim(unit, epoch)
        # Looking first spares the losers of a rush at the start a written and synced file for each loss.
        won = not path.exists() and publish_bytes(path, _claim_json(self._identity, self._goals[unit])) is Published.WON
        self._epochs[unit] = epoch
        if won:
            self._held[unit] = epoch
        return won

    def _holder(self, unit: int, epoch: int) -> Identity | None:
        if (unit, epoch) not in self._holders:
            self._holders[unit, epoch] = self._read_holder(unit, epoch)
        return self._holders[unit, epoch]

    def _read_holder(self, unit: int, epoch: int) -> Identity | None:
        path = self._run_dir.claim(unit, epoch)
        try:
            raw = json.loads(path.read_bytes())
            is_over = raw["holder"] is None or raw["generation"] < self._goals[unit]
            return None if is_over else Identity(**raw["holder"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged: claims are published whole; the unit is taken over", path)
            return UNKNOWN

    def _is_lost(self, holder: Identity) -> bool:
        if holder is UNKNOWN:
            return True
        if holder.replica == self._identity.replica:
            # A former life of this replica; or ourselves, when publishing failed after the file had got its name.
            return True
        return holder.is_dead_beside(self._identity) or self._has_stalled(holder.replica)

    def _has_stalled(self, replica: str) -> bool:
        """Whether the heartbeat stood still for the time-out on our own clock. No heartbeat yet counts from the first look."""
        beat, now = self._beat(replica), self._clock()
        before = self._beats.get(replica)
        if before is None or before[0] != beat:
            self._beats[replica] = (beat, now)
            return False
        return now - before[1] >= self._stall_timeout_s

    def _beat(self, replica: str) -> int | None:
        try:
            return int(json.loads(self._run_dir.progress(replica).read_bytes())["beat"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # not yet written, or damaged: counts as standing still
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # replaced on an NFS server while we read: it beats
                return None
            raise


def units_of(run_dir: RunDir, replica: str, goals: Mapping[int, int]) -> list[int]:
    """Units that are not done and that the replica, which has ended, had not given back. Somebody may have taken them over."""
    done = run_dir.done_units()
    claims: dict[int, list[int]] = {}
    for parsed in filter(None, map(parse_claim, os.listdir(run_dir.claims))):
        if done.get(parsed[0], -1) < goals.get(parsed[0], 0):
            claims.setdefault(parsed[0], []).append(parsed[1])
    return sorted(
        unit for unit, epochs in claims.items() if _was_held(run_dir, replica, unit, sorted(epochs), goals.get(unit, 0))
    )


def _was_held(run_dir: RunDir, replica: str, unit: int, epochs: Sequence[int], generation: int) -> bool:
    raw = {epoch: json.loads(run_dir.claim(unit, epoch).read_bytes()) for epoch in epochs}
    for epoch, claim in raw.items():
        is_own = claim["holder"] is not None and claim["holder"]["replica"] == replica and claim["generation"] == generation
        following = raw.get(epoch + 1)
        if is_own and (following is None or following["holder"] is not None):
            return True
    return False


def _claim_json(holder: Identity | None, generation: int = 0) -> bytes:
    return json.dumps({"holder": None if holder is None else dataclasses.asdict(holder), "generation": generation}).encode()


def _is_hidden(pid: int) -> bool:
    """Whether the process of another user is there although /proc (mounted with hidepid) does not show it."""
    if Path(f"/proc/{pid}").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return False  # it ended and its number was used again while we looked
