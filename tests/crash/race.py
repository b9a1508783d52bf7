"""Several workers on the same units, killed and frozen at random until the run is done. usage: race.py FOLDER SEED UNITS NAMES

Half of the workers say that they are on another host, so that only their heartbeat speaks for them; a worker frozen for
longer than the time-out wakes up as a second worker on a unit that was taken from it. NAMES a claim are listed: few, as if the
run were large. Prints what happened.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import driver
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.reader import scan_shards
from batchinfer.data.schema import RowRange
from batchinfer.job import claims
from batchinfer.job.claims import Identity
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published, replace_bytes

WORKERS = 4
STALL_TIMEOUT_S = 0.15


def create_run(folder: Path, units: int) -> RunDir:
    run_dir, data = RunDir(folder / "run"), folder / "data"
    data.mkdir()
    pq.write_table(pa.table({"id": range(3 * units), "prompt": [f"prompt {i}" for i in range(3 * units)]}), data / "a.parquet")
    inputs, config = scan_shards([str(data)]), driver.config_of(0, str(data))
    request = request_of(config, inputs.shards, inputs.schema)
    Manifest.create(run_dir, config, inputs, ["id"], [(RowRange(0, 3 * i, 3 * i + 3),) for i in range(units)], request)
    return run_dir


class RacingWorker(driver.Worker):
    """Beats, dawdles, and writes down every commit that it won."""

    def race(self, dice: random.Random) -> None:
        beat = 0
        while not self.board.finished():
            beat += 1
            replace_bytes(self.run_dir.progress(self.replica), json.dumps({"beat": beat}).encode())
            unit = self.board.claim()
            time.sleep(dice.uniform(0, 0.04))
            if unit is not None and dice.random() < 0.1:
                self.board.release(unit)
            elif unit is not None and self.commit(unit) is Published.WON:
                with (self.run_dir.root / "won").open("a") as file:
                    file.write(f"{unit}\n")


def start(run_dir: RunDir, seed: int) -> int:
    pid = os.fork()
    if pid == 0:
        exit_code = 1
        try:
            dice = random.Random(seed)
            identity = Identity.here(run_dir.new_replica(f"w{seed}"))
            elsewhere = replace(identity, host=identity.replica) if dice.random() < 0.5 else identity
            RacingWorker(run_dir, elsewhere, STALL_TIMEOUT_S).race(dice)
            exit_code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(exit_code)
    return pid


def disturb(pid: int, dice: random.Random, happened: Counter[str]) -> None:
    if dice.random() < 0.8:
        os.kill(pid, signal.SIGKILL)
        happened["kills"] += 1
    else:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * STALL_TIMEOUT_S)
        os.kill(pid, signal.SIGCONT)
        happened["freezes"] += 1


def reap(pids: list[int], happened: Counter[str]) -> list[int]:
    """The workers that still run. One that ended by itself must have ended well."""
    alive = []
    for pid in pids:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            alive.append(pid)
        elif not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "a worker failed, see above"
            happened["finished"] += 1
    return alive


def race(folder: Path, seed: int, units: int) -> Counter[str]:
    run_dir, dice, happened = create_run(folder, units), random.Random(seed), Counter({"kills": 0, "freezes": 0})
    alive: list[int] = []
    numbers = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
    while not happened["finished"]:
        alive += [start(run_dir, next(numbers)) for _ in range(WORKERS - len(alive))]
        time.sleep(dice.uniform(0, 0.06))
        disturb(dice.choice(alive), dice, happened)
        alive = reap(alive, happened)
    while alive:
        time.sleep(0.01)
        alive = reap(alive, happened)
    won = Counter((run_dir.root / "won").read_text().split())
    assert max(won.values()) == 1, f"units committed twice: {won}"
    happened["later_claims"] = sum(name.split(".")[1] != "0" for name in os.listdir(run_dir.claims) if name[0] != ".")
    driver.check_complete(run_dir)
    return happened


if __name__ == "__main__":
    driver.manifest_module.git_commit = lambda: None
    claims.NAMES_PER_CLAIM = int(sys.argv[4])
    print(json.dumps(race(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
