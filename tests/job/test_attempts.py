"""What a node writes down when a replica dies, and when it gives up: fake workers that play by the rules of a real one."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchinfer.config import from_dict
from batchinfer.data.reader import InputSet
from batchinfer.data.schema import RowRange, Shard
from batchinfer.job.attempts import add_attempt, doubtful_units, read_attempts, record_death
from batchinfer.job.claims import units_of
from batchinfer.job.manifest import Manifest
from batchinfer.job.narrowing import MOST_BARREN, SUSPECT_AFTER, TIMES, Attempt, Event, find
from batchinfer.job.node import NodeJob
from batchinfer.job.replica import read_death
from batchinfer.job.rundir import RunDir

ROWS = 8

# It has one unit, and ends by a signal of its own when `deadly` says so of the rows that it runs.
WORKER = """
    import json, os, signal, sys
    from pathlib import Path
    from batchinfer.job.attempts import add_attempt, read_attempts
    from batchinfer.job.narrowing import Attempt, Event, find
    from batchinfer.job.rundir import RunDir
    run_dir, name = RunDir(Path(sys.argv[1])), sys.argv[sys.argv.index("--replica") + 1]
    claim = dict(holder=dict(replica=name), generation=0)
    run_dir.claim(0, len(os.listdir(run_dir.claims))).write_text(json.dumps(claim))
    findings = find(read_attempts(run_dir, 0, 0), range(%d))
    def run(rows):
        if DEADLY & set(rows):
            os.kill(os.getpid(), SIGNAL)
    if not findings.is_suspect:
        run(range(%d))
    while findings.sets:
        for event in (Event.BEGUN, Event.PASSED):
            add_attempt(run_dir, 0, 0, attempt := Attempt(event, name, findings.sets[0]))
            findings.add(attempt)
            if event is Event.BEGUN:
                run(attempt.rows)
    run_dir.completion(0, 0).write_bytes(b"")
"""


def make_run(root: Path) -> RunDir:
    run_dir = RunDir(root / "run")
    config = {"hw": {"gpu": None}, "model": {"path": "c"}, "input": {"paths": ["in"], "prompt_column": "p"}}
    inputs = InputSet(root, (Shard("a.parquet", 1, ROWS, ""),), pa.schema([]))
    Manifest.create(run_dir, from_dict(config), inputs, [], [(RowRange(0, 0, ROWS),)], {})
    return run_dir


def run(folder: Path, run_dir: RunDir, deadly: set[int], signal: int = 9) -> tuple[int, int]:
    """Exit code of a job of one replica, and how many died."""
    path = folder / "fake_worker.py"
    path.write_text(f"DEADLY, SIGNAL = {deadly}, {signal}\n" + textwrap.dedent(WORKER % (ROWS, ROWS)))
    number, _ = run_dir.new_submission()
    job = NodeJob(str(run_dir.root), number, 0, 1, 1, (), grace_s=1.0, command=(sys.executable, str(path)))
    code = job()
    return code, sum(read_death(run_dir, name) is not None for name in os.listdir(run_dir.replicas))


def test_a_row_that_kills_is_narrowed_down_without_a_commit(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    assert run(tmp_path, run_dir, {3}) == (0, SUSPECT_AFTER + 2 * TIMES)
    findings = find(read_attempts(run_dir, 0, 0), range(ROWS))
    assert findings.condemned == {3: "killed by SIGKILL; often the host ran out of memory"} and not findings.sets
    assert doubtful_units(run_dir) == [0]


def test_where_everything_kills_it_is_given_up_and_nobody_condemned(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    assert run(tmp_path, run_dir, set(range(ROWS))) == (1, MOST_BARREN + 1)
    assert not find(read_attempts(run_dir, 0, 0), range(ROWS)).condemned
    deaths = [read_death(run_dir, name) for name in os.listdir(run_dir.replicas)]
    assert sum(death.early for death in deaths if death) == 1, "by which a node would be left out: rows may be why, after that"


def test_a_sigterm_from_outside_is_no_attempt(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    assert run(tmp_path, run_dir, {3}, signal=15) == (1, 1)
    assert read_attempts(run_dir, 0, 0) == []


def claim(run_dir: RunDir, unit: int, epoch: int, replica: str | None, generation: int = 0) -> None:
    holder: Any = None if replica is None else {"replica": replica}
    run_dir.claim(unit, epoch).write_text(json.dumps({"holder": holder, "generation": generation}))


def test_what_a_dead_replica_held(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    for unit in range(6):
        claim(run_dir, unit, 0, "a")
    claim(run_dir, 1, 1, None)  # given back
    claim(run_dir, 2, 1, "b")  # taken over, when it stood still
    claim(run_dir, 3, 1, None)
    claim(run_dir, 3, 2, "a")  # and taken again
    run_dir.completion(4, 0).write_bytes(b"")
    run_dir.completion(5, 0).write_bytes(b"")
    assert units_of(run_dir, "a", {}) == [0, 2, 3] and units_of(run_dir, "b", {}) == [2]
    assert units_of(run_dir, "a", {4: 1, 5: 1}) == [0, 2, 3], "a claim for the generation before"
    claim(run_dir, 4, 1, "a", generation=1)
    assert units_of(run_dir, "a", {4: 1, 5: 1}) == [0, 2, 3, 4]


def test_attempts_are_told_in_order_and_by_generation(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    attempts = [Attempt(Event.BEGUN, "a", (1, 2)), Attempt(Event.PASSED, "a", (1, 2)), Attempt(Event.DIED, "b", reason="so")]
    for attempt in attempts:
        add_attempt(run_dir, 7, 0, attempt)
    add_attempt(run_dir, 7, 1, attempts[0])
    assert read_attempts(run_dir, 7, 0) == attempts and read_attempts(run_dir, 7, 1) == attempts[:1]
    assert read_attempts(run_dir, 70, 0) == []


def test_what_a_death_teaches(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    claim(run_dir, 0, 0, "a")
    first = record_death(run_dir, "a", "so", held=[0])  # it says so too
    assert (first.recorded, first.suspected, first.apart) == (True, False, False)
    claim(run_dir, 0, 1, "b")
    assert record_death(run_dir, "b", "so").suspected
    claim(run_dir, 0, 2, "c")
    for event in (Event.BEGUN, Event.PASSED, Event.BEGUN):
        add_attempt(run_dir, 0, 0, Attempt(event, "c", (0,)))
    third = record_death(run_dir, "c", "so")
    assert (third.suspected, third.apart, third.passed) == (False, True, True)
    assert not record_death(run_dir, "nobody", "so").recorded
