"""Replicas with a real engine that some rows kill, one life after the other: every other row comes out as if nothing had been."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from batchinfer.engine.engine import build_engine
from batchinfer.job.attempts import Gain, add_attempt, doubtful_units, read_attempts, record_death
from batchinfer.job.claims import Identity
from batchinfer.job.manifest import Manifest
from batchinfer.job.narrowing import SUSPECT_AFTER, TIMES, Attempt, Event
from batchinfer.job.retry import begin
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from batchinfer.job.vitals import Pulse
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from batchinfer.worker.progress import Progress
from batchinfer.worker.replica import Assignment, Replica
from tests.worker.runs import ROWS, UNIT, make_run


class Killed(Exception):
    """What stands for the end of the process."""


class Down(Killed):
    """With its node, so that nobody records it."""


Look = Callable[[Replica, set[int]], None]  # at the rows that are in the engine, before each step


class Lives:
    """The replicas of a run, one after the other, and what their node does when one dies."""

    def __init__(self, run_dir: RunDir, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir, self.manifest = run_dir, manifest
        self.names: list[str] = []
        monkeypatch.setattr(Identity, "is_dead_beside", lambda holder, observer: holder.replica != self.names[-1])

    def live(self, look: Look) -> bool | Gain:
        """One of them. Returns whether it completed the run, or, when it was killed, what its node learnt."""
        name = f"r{len(self.names)}"
        self.names.append(name)
        config = self.manifest.config
        shape = load_shape(config.model)
        engine = build_engine(config, shape, TensorParallel(), torch.device("cpu"))
        self.run_dir.replica(name).mkdir()
        assignment = Assignment(self.run_dir, self.manifest, config, name, None)
        replica = Replica(assignment, shape, engine, Progress(self.run_dir, name), Pulse())
        step, wind_up = engine.step, replica._wind_up

        def looked(last: bool = False) -> Any:
            look(replica, {seq.request.prompt_token_ids[0] - 1 for seq in engine.sequences.values()})
            return step(last)

        engine.step = looked  # type: ignore[method-assign]
        replica._wind_up = lambda: None  # type: ignore[method-assign]
        try:
            complete = replica.run()
            wind_up()
            return complete
        except Killed as killed:
            replica._source.stop()
            replica._sink._thread.shutdown()
            return Gain() if isinstance(killed, Down) else record_death(self.run_dir, name, str(killed))
        finally:
            engine.close()


def kill_by(poison: set[int]) -> Look:
    def look(replica: Replica, rows: set[int]) -> None:
        if poison & rows:
            raise Killed(f"killed by rows {sorted(rows)}")

    return look


def rows_of(run_dir: RunDir) -> dict[tuple[int, int], tuple[list[int] | None, str | None]]:
    assert verify(run_dir) == []
    tables = [pq.read_table(path) for path in run_dir.completions.glob("*.parquet")]
    return {(row["row"], row["sample"]): (row["token_ids"], row["error"]) for t in tables for row in t.to_pylist()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    with pytest.MonkeyPatch.context() as patch:
        run_dir, manifest = make_run(tmp_path_factory.mktemp("undisturbed"), n=2)
        assert Lives(run_dir, manifest, patch).live(kill_by(set())) is True
    return rows_of(run_dir)


def expected(undisturbed: dict[tuple[int, int], Any], poison: set[int]) -> dict[tuple[int, int], Any]:
    healthy = {key: row for key, row in undisturbed.items() if key[0] not in poison}
    return healthy | {(row, 0): (None, "killed_replica") for row in poison}


def until_complete(lives: Lives, looks: Callable[[], Look], most: int) -> list[Gain]:
    gains = []
    while (end := lives.live(looks())) is not True:
        gains.append(end or Gain())  # nothing, after a stop
        assert len(gains) <= most, "it does not end"
    return gains


@pytest.mark.parametrize("poison", [{5}, {0, ROWS - 1}])
def test_rows_that_kill_become_error_rows_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[tuple[int, int], Any], poison: set[int]
) -> None:
    run_dir, manifest = make_run(tmp_path, n=2)
    lives = Lives(run_dir, manifest, monkeypatch)
    gains = until_complete(lives, lambda: kill_by(poison), len(poison) * (SUSPECT_AFTER + 2 * TIMES))
    assert [gain.apart for gain in gains[:SUSPECT_AFTER]] == [False] * SUSPECT_AFTER and gains[-1].apart
    assert rows_of(run_dir) == expected(undisturbed, poison)
    table = pq.read_table(run_dir.completion(min(poison) // UNIT, 0))
    messages = [message for message in table["error_message"].to_pylist() if message]
    assert messages == [f"alone in the engine it ended its replica 2 times; the last one killed by rows [{min(poison)}]"]
    assert {row // UNIT for row in poison} <= set(doubtful_units(run_dir))
    assert not list(run_dir.partials.iterdir()), "they go with their units"


def test_what_passed_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, manifest = make_run(tmp_path, n=2)
    lives = Lives(run_dir, manifest, monkeypatch)
    passed: list[set[int]] = []

    def look(replica: Replica, rows: set[int]) -> None:
        events = [attempt for attempt in read_attempts(run_dir, 1, 0) if attempt.event is Event.PASSED]
        done = {UNIT + row for attempt in events for row in attempt.rows}
        assert not done & rows, "it had passed, and was saved"
        passed.append(done)
        kill_by({5})(replica, rows)

    until_complete(lives, lambda: look, SUSPECT_AFTER + 2 * TIMES)
    assert {4, 6, 7} in passed


def test_kills_from_outside_and_stops_condemn_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[tuple[int, int], Any]
) -> None:
    """One unit is suspect without reason; whatever it runs is killed once, or stopped once, at any step."""
    run_dir, manifest = make_run(tmp_path, n=2)
    for k in range(SUSPECT_AFTER):
        add_attempt(run_dir, 2, 0, Attempt(Event.DIED, f"before{k}"))
    lives, rng = Lives(run_dir, manifest, monkeypatch), random.Random(4)
    for end in ("kill", "stop", "stop"):
        steps = itertools.count()
        last = rng.randrange(3, 30)

        def look(replica: Replica, rows: set[int], steps: Any = steps, last: int = last, end: str = end) -> None:
            if next(steps) == last and end == "stop":
                replica.stop()
            elif rows & {8, 9, 10, 11} and end == "kill":
                assert rows <= {8, 9, 10, 11}, "it runs apart"
                raise Killed("killed from outside")

        assert lives.live(look) is not True
    assert lives.live(kill_by(set())) is True
    assert rows_of(run_dir) == undisturbed


def test_a_retry_forgets_and_may_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[tuple[int, int], Any]
) -> None:
    run_dir, manifest = make_run(tmp_path, n=2)
    lives, most = Lives(run_dir, manifest, monkeypatch), SUSPECT_AFTER + 2 * TIMES
    until_complete(lives, lambda: kill_by({5}), most)
    begin(run_dir, ["killed_replica"])
    gains = until_complete(lives, lambda: kill_by({5}), most)
    assert len(gains) == SUSPECT_AFTER + TIMES, "it is the only row of its unit now"
    assert rows_of(run_dir) == expected(undisturbed, {5})
    begin(run_dir, [])
    assert lives.live(kill_by(set())) is True
    assert rows_of(run_dir) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[tuple[int, int], Any], seed: int) -> None:
    """Rows that kill, among kills that are not recorded, as when a node goes down, and stops."""
    rng = random.Random(seed)
    run_dir, manifest = make_run(tmp_path, n=2)
    lives, poison = Lives(run_dir, manifest, monkeypatch), set(rng.sample(range(ROWS), rng.randrange(4)))

    def disturbed() -> Look:
        last, steps, end = rng.randrange(5, 200), itertools.count(), rng.choice(["", "stop", "node"])

        def look(replica: Replica, rows: set[int]) -> None:
            if next(steps) == last and end == "stop":
                replica.stop()
            if next(steps) >= last and end == "node":
                raise Down
            kill_by(poison)(replica, rows)

        return look

    until_complete(lives, disturbed, 60)
    assert rows_of(run_dir) == expected(undisturbed, poison)
