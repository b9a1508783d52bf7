"""Claims at scale: many replicas, as threads with a real `ClaimBoard` each, against one folder, until every unit is done.

    python slurm/bench/claims_scale.py --replicas 1000 --units 100000                  # the folder is in memory
    python slurm/bench/claims_scale.py --replicas 1000 --units 100000 --latency-ms 5   # as on a busy file server

Every call that would reach a file server is counted, and takes `--latency-ms` longer: a listing one round trip for each
thousand names. A unit is work for `--unit-s`, give or take a half, and its commit is an empty file. Some replicas die with
their claims (`--deaths` of them, at random moments; nobody sees more than their silence), as many give a unit back for which
they have no time. Prints operations for each claim, and for each look of a replica that finds nothing to do, how long a claim
takes, how evenly the units fell, how many were worked on twice, and how long the last ones took. One process does it all, so
its processor makes everything later than on as many nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchinfer.job.claims import ClaimBoard, Identity
from batchinfer.job.rundir import RunDir
from batchinfer.publish import replace_bytes
from batchinfer.worker.source import CLAIM_INTERVAL_S

OPERATIONS = ("open", "write", "fsync", "link", "unlink", "stat", "listdir")
NAMES_PER_ROUND_TRIP = 1000


class Server:
    """Counts what the calls of `os` ask of the folder, and makes each of them wait; only on threads that are `counted`."""

    def __init__(self, latency_s: float):
        self.latency_s = latency_s
        self._thread = threading.local()
        for name in OPERATIONS:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            counts = getattr(self._thread, "counts", None)
            if counts is None:
                return call(*args, **kwargs)
            counts[name] += 1
            if name != "write":  # goes with the fsync
                time.sleep(self.latency_s)
            result = call(*args, **kwargs)
            if name == "listdir":
                counts["names"] += len(result)
                time.sleep(self.latency_s * (len(result) // NAMES_PER_ROUND_TRIP))
            return result

        return watched

    def count(self) -> Counter[str]:
        """What follows, on this thread, until `rest`."""
        self._thread.counts = counts = Counter()
        return counts

    def rest(self) -> None:
        self._thread.counts = None


class SimulatedReplica(threading.Thread):
    def __init__(self, number: int, run_dir: RunDir, server: Server, options: argparse.Namespace):
        super().__init__(name=f"01-{number}-0", daemon=True)
        self._run_dir, self._server, self._options = run_dir, server, options
        self._dice = random.Random(number)
        identity = replace(Identity.here(self.name), host=f"node{number}")
        self.board = ClaimBoard(run_dir, options.units, identity, options.stall_timeout_s)
        mean_units = options.units / options.replicas
        self._dies_after = self._dice.randrange(int(mean_units)) if number < options.deaths else None
        self._returns = self._dice.randrange(int(mean_units)) if options.replicas - number <= options.deaths else None
        self.done: list[int] = []
        self.claim_s: list[float] = []
        self.claims, self.looks = Counter[str](), Counter[str]()  # what they cost: of operations, and of calls
        self.idle_since: float | None = None
        self.committed = 0.0
        run_dir.replica(self.name).mkdir()

    def run(self) -> None:
        stopped = threading.Event()
        threading.Thread(target=self._beat, args=(stopped,), daemon=True).start()
        try:
            while (unit := self._claim()) is not None or not self.board.finished():
                if unit is None:
                    self.idle_since = self.idle_since or time.monotonic()
                    time.sleep(CLAIM_INTERVAL_S)
                elif not self._work(unit):
                    return
        finally:
            stopped.set()

    def _claim(self) -> int | None:
        start, counts = time.monotonic(), self._server.count()
        unit = self.board.claim()
        self._server.rest()
        counts["calls"] += 1
        (self.looks if unit is None else self.claims).update(counts)
        if unit is not None:
            self.claim_s.append(time.monotonic() - start)
        return unit

    def _work(self, unit: int) -> bool:
        """False: it died over it."""
        if len(self.done) == self._returns:
            self._returns = None
            self.board.release(unit)
            return True
        time.sleep(self._options.unit_s * self._dice.uniform(0.5, 1.5))
        if len(self.done) == self._dies_after:
            return False
        self.done.append(unit)
        self._run_dir.completion(unit, 0).touch()
        self.committed = time.monotonic()
        return True

    def _beat(self, stopped: threading.Event) -> None:
        beat = 0
        while not stopped.wait(self._options.stall_timeout_s / 4):
            beat += 1
            replace_bytes(self._run_dir.progress(self.name), json.dumps({"beat": beat}).encode())


def simulate(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    run_dir = RunDir(folder / "run")
    run_dir.create()
    server = Server(options.latency_ms / 1000)
    replicas = [SimulatedReplica(number, run_dir, server, options) for number in range(options.replicas)]
    start = time.monotonic()
    for each in replicas:
        each.start()
    for each in replicas:
        each.join()
    worked_on = Counter(unit for each in replicas for unit in each.done)
    assert sorted(worked_on) == list(range(options.units)), "units are lost"
    alive = [each for each in replicas if each._dies_after is None]
    claims_s = sorted(second for each in replicas for second in each.claim_s)
    units = sorted(len(each.done) for each in alive)
    end = max(each.committed for each in replicas)
    return {
        "replicas": options.replicas,
        "units": options.units,
        "latency_ms": options.latency_ms,
        "a claim": mean([each.claims for each in replicas]),
        "a look without a claim": mean([each.looks for each in replicas]),
        "claim_s (median, 99 %)": [round(statistics.median(claims_s), 4), round(claims_s[len(claims_s) * 99 // 100], 3)],
        "units a replica (least, median, most)": [units[0], statistics.median(units), units[-1]],
        "worked on twice": sum(worked_on.values()) - options.units,
        "tail_s": round(end - min((each.idle_since for each in alive if each.idle_since), default=end), 1),
        "last replica ends after the last commit by, s": round(time.monotonic() - end, 1),
        "wall_s": round(end - start, 1),
        "cpu_s": round(time.process_time(), 1),
    }


def mean(counts: list[Counter[str]]) -> dict[str, float]:
    """Of a call: operations that a server sees, all and by kind, and names that it lists."""
    total = sum(counts, Counter())
    each = {name: total[name] / total["calls"] for name in (*OPERATIONS, "names")}
    every = sum(each[name] for name in OPERATIONS if name != "write")  # which goes with the fsync
    return {name: round(value, 2) for name, value in {"calls": total["calls"], "operations": every, **each}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--unit-s", type=float, default=4.0)
    parser.add_argument("--deaths", type=int, default=10)
    parser.add_argument("--stall-timeout-s", type=float, default=30.0)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the run is made, and removed again")
    options = parser.parse_args()
    threading.stack_size(256 * 1024)
    sys.setswitchinterval(1)  # a thousand threads that ask for the interpreter every 5 ms would do nothing else
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for key, value in simulate(Path(folder), options).items():
            print(f"{key:48} {value}", flush=True)


if __name__ == "__main__":
    main()
