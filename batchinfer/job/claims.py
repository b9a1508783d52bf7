"""Who works on which unit: claim files with epochs, and when a holder counts as lost.

Claims only save work. Two replicas on one unit waste time, and `publish` still lets only one of them commit, so every rule
here may err towards giving a unit away, and none may leave it with nobody for ever. A unit's claim is the file of its highest
epoch: epoch 0 is the first holder; taking over and giving back both publish epoch + 1, which only one caller can win.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import random
import socket
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


NEVER = -1  # the epoch of a unit that nobody has claimed
NAMES_PER_CLAIM = 3000  # to list, for each call: a file server answers about as soon as it publishes the claim
LOOKS = 16  # units in work that a replica with nothing to do looks at in a call
UNKNOWN = Identity("", "", 0, 0, "", "")  # holder of a claim file that something else has damaged


class ClaimBoard:
    """One replica's view of the claims of a run. Remembers what cannot change: done units, who wrote a claim file.

    A view may be old, because listing folders of as many names as a run has units, for each of them, would be quadratic: what a
    call of `claim` costs does not grow with the run. It lists as often as makes `NAMES_PER_CLAIM` names a call, which in a run of
    up to a thousand units is always. In between it asks for single names: the next free unit is found by doubling and halving,
    since units are taken in order, and a bounded number of units in work is looked at.
    """

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
        self._goals, self._doubtful = dict(goals or {}), sorted(doubtful)
        self._dice = random.Random(identity.replica)
        # Four bytes a unit: there may be many units, and many boards in one test.
        self._pending = array("i", range(num_units))
        self._epochs = array("i", [NEVER]) * num_units  # the highest of every unit that we know of
        self._candidates = array("i")  # pending units that were free, or may have been, when they were last seen; in order
        self._turn = self._dice.randrange(max(1, num_units))  # where in `_pending` to look next
        self._calls_left = 0.0  # of `claim` until the next listing
        self._spread = 1.0  # among so many of the first free units we choose one by chance
        self._held: dict[int, int] = {}  # unit -> epoch of our claim; another thread may ask for it at any time
        self._holders: dict[tuple[int, int], Identity | None] = {}  # (unit, epoch) -> who; None: given back
        self._beats: dict[str, tuple[int | None, float]] = {}  # replica -> heartbeat, and our clock when we first saw it

    def claim(self) -> int | None:
        """A unit that nobody holds and nobody has done, lowest number first; then those of lost holders (doubtful ones before
        all). None: nothing now. Reads each claim file at most once."""
        self._calls_left -= 1
        seen = self._list() if self._calls_left <= 0 else None
        unit = self._claim_lost(self._doubtful)
        if unit is None:
            unit = self._claim_free()
        if unit is None and seen is None:
            seen = self._look_around()
            unit = self._claim_free()
        return self._claim_lost(seen or ()) if unit is None else unit

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
        epoch = self._held.get(unit)
        return epoch is not None and not self._run_dir.claim(unit, epoch + 1).exists()

    def held(self) -> list[int]:
        """Our claims that still stand, on units that are not done."""
        for unit in filter(self._is_done, list(self._held)):
            self._held.pop(unit, None)
        return list(filter(self.holds, list(self._held)))

    def finished(self) -> bool:
        """Whether no unit is left, as far as the last `claim` could see."""
        return not self._pending

    def pending(self) -> list[int]:
        """Units that are not done, whoever holds them."""
        self._list()
        return self._pending.tolist()

    def _list(self) -> array[int]:
        """See everything: a listing of each folder. Returns what is not done."""
        names = os.listdir(self._run_dir.claims)
        for parsed in filter(None, map(parse_claim, names)):
            if parsed[0] < len(self._epochs):
                self._epochs[parsed[0]] = max(parsed[1], self._epochs[parsed[0]])
        num_done = self._list_completions()
        self._candidates = array("i", filter(self._may_be_free, self._pending))
        # Drawn, so that replicas which start together do not list together. A unit that nobody has claimed costs us time too.
        self._calls_left = self._dice.uniform(0.5, 1.5) * max(len(names) + num_done, len(self._epochs)) / NAMES_PER_CLAIM
        return self._pending

    def _list_completions(self) -> int:
        generations = self._run_dir.done_units()
        done = {unit for unit, generation in generations.items() if generation >= self._goal(unit)}
        self._pending = array("i", itertools.filterfalse(done.__contains__, self._pending))
        self._doubtful = [unit for unit in self._doubtful if unit not in done]
        for unit in done.intersection(list(self._held)):
            self._held.pop(unit, None)
        return len(generations)

    def _look_around(self) -> array[int]:
        """See a few of the units that are not done, others each time. Returns those of them that still are not."""
        left = self._look_at_some()
        if self._pending and not left:
            self._list_completions()  # most is done by now, so it is worth it
            left = self._look_at_some()
        self._candidates = array("i", filter(self._may_be_free, left))
        return left

    def _look_at_some(self) -> array[int]:
        first, count = self._turn, len(self._pending)
        looked_at = [self._pending[(first + i) % count] for i in range(min(LOOKS, count))]
        done = set(filter(self._is_done, looked_at))
        if done:
            self._pending = array("i", itertools.filterfalse(done.__contains__, self._pending))
        left = array("i", itertools.filterfalse(done.__contains__, looked_at))
        self._turn = (first + len(left)) % max(1, len(self._pending))
        for unit in left:
            while self._run_dir.claim(unit, self._epochs[unit] + 1).exists():
                self._epochs[unit] += 1
        return left

    def _goal(self, unit: int) -> int:
        return self._goals.get(unit, 0)

    def _is_done(self, unit: int) -> bool:
        return self._run_dir.completion(unit, self._goal(unit)).exists()

    def _may_be_free(self, unit: int) -> bool:
        """Never claimed, or perhaps given back, or claimed for a generation before. In generation 0, epoch 0 is neither, so a
        long list of first claims is not read at all."""
        epoch = self._epochs[unit]
        return epoch == NEVER or (epoch + self._goal(unit) > 0 and self._holders.get((unit, epoch)) is None)

    def _claim_free(self) -> int | None:
        while self._skip_taken():
            count = len(self._candidates)
            place = self._dice.randrange(min(int(self._spread), 1 + count // 8))  # the last units stay the last ones
            if place and self._is_taken(self._candidates[place]):
                del self._candidates[place]
                place = 0
            unit = self._candidates.pop(place)
            epoch = self._epochs[unit]
            if epoch != NEVER and (self._holder(unit, epoch) is not None or self._is_done(unit)):
                continue
            if self._take(unit):
                return unit
        return None

    def _skip_taken(self) -> bool:
        """Drop the candidates before the first one that nobody has taken. Whether there is one.

        Few are out of order, and whoever lists next sees them: so the first free one is sought as the end of a sequence of
        unknown length, in twice its logarithm of looks (Bentley and Yao 1976, An almost optimal algorithm for unbounded
        searching).
        """
        low, high, count = 0, 1, len(self._candidates)
        while high <= count and self._is_taken(self._candidates[high - 1]):
            low, high = high, 2 * high
        free = bisect_left(self._candidates, True, low, min(high - 1, count), key=lambda unit: not self._is_taken(unit))
        del self._candidates[:free]
        return bool(self._candidates)

    def _is_taken(self, unit: int) -> bool:
        """Whether somebody has claimed it since we saw it."""
        return self._run_dir.claim(unit, self._epochs[unit] + 1).exists()

    def _claim_lost(self, units: Iterable[int]) -> int | None:
        lost: dict[str, bool] = {}  # by replica, so that each heartbeat is read once
        for unit in units:
            epoch = self._epochs[unit]
            if epoch == NEVER or self._held.get(unit) == epoch:
                continue
            holder = self._holder(unit, epoch)
            if holder is None:  # given back, and another replica was faster to take it
                continue
            if holder.replica not in lost:
                lost[holder.replica] = self._is_lost(holder)
            # What a dead process had committed is visible by now, and may be newer than our listing. Looking for another claim
            # first spares the losers of a rush a written and synced file.
            if lost[holder.replica] and not self._is_done(unit) and not self._is_taken(unit) and self._take(unit):
                return unit
        return None

    def _take(self, unit: int) -> bool:
        """True: it is to be begun. What was taken from us when we stood still, and lost or given back since, is renewed, not
        begun anew. Whoever is beaten to a unit leaves room from now on to the others who are after the first free one."""
        in_work = unit in self._held
        self._epochs[unit] += 1
        path = self._run_dir.claim(unit, self._epochs[unit])
        if publish_bytes(path, _claim_json(self._identity, self._goal(unit))) is Published.LOST:
            self._spread *= 4
            return False
        self._spread = max(1.0, 0.9 * self._spread)
        self._held[unit] = self._epochs[unit]
        return not in_work

    def _holder(self, unit: int, epoch: int) -> Identity | None:
        if (unit, epoch) not in self._holders:
            self._holders[unit, epoch] = self._read_holder(unit, epoch)
        return self._holders[unit, epoch]

    def _read_holder(self, unit: int, epoch: int) -> Identity | None:
        path = self._run_dir.claim(unit, epoch)
        try:
            raw = json.loads(path.read_bytes())
            is_over = raw["holder"] is None or raw["generation"] < self._goal(unit)
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
