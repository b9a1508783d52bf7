"""A replica with a real engine, told when its time is up: it begins nothing it could not finish, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from batchinfer.data.reader import UnitReader
from batchinfer.engine.engine import build_engine
from batchinfer.job.claims import ClaimBoard, Identity
from batchinfer.job.manifest import Manifest
from batchinfer.job.replica import read_progress
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from batchinfer.job.vitals import Phase, Pulse
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from batchinfer.worker import sink
from batchinfer.worker.progress import Progress
from batchinfer.worker.replica import Assignment, Replica
from tests.worker.runs import ROWS, TOKENS, make_run


def work(
    run_dir: RunDir, manifest: Manifest, name: str, left_s: float = 1e9, prepare: Callable[[Replica], Any] = lambda _: None
) -> bool:
    config = manifest.config
    shape = load_shape(config.model)
    engine = build_engine(config, shape, TensorParallel(), torch.device("cpu"))
    run_dir.replica(name).mkdir()
    assignment = Assignment(run_dir, manifest, config, name, None, time.time() + left_s)
    replica = Replica(assignment, shape, engine, Progress(run_dir, name), Pulse())
    prepare(replica)
    try:
        complete = replica.run()
        assert engine.in_flight is None, "tokens were drawn that nobody read"
        return complete
    finally:
        engine.close()


def rows_of(run_dir: RunDir) -> dict[int, list[int]]:
    assert verify(run_dir) == []
    tables = [pq.read_table(path) for path in run_dir.completions.glob("*.parquet")]
    return {row["row"]: row["token_ids"] for table in tables for row in table.to_pylist()}


def decoded(run_dir: RunDir) -> int:
    return sum(sum(pq.read_table(path)["decode_tokens"].to_pylist()) for path in run_dir.stats.glob("*.parquet"))


def nobody_holds(run_dir: RunDir, manifest: Manifest) -> bool:
    board = ClaimBoard(run_dir, len(manifest.units), Identity.here("observer"), 1e9)
    left = set(board.pending())
    return {board.claim() for _ in left} == left


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    run_dir, manifest = make_run(tmp_path_factory.mktemp("undisturbed"))
    assert work(run_dir, manifest, "a")
    rows = rows_of(run_dir)
    assert len(rows) == ROWS and decoded(run_dir) == ROWS * TOKENS
    return rows


def after_steps(count: int, then: Callable[[Replica], None]) -> Callable[[Replica], None]:
    """Calls `then` when the engine has done so many steps."""

    def prepare(replica: Replica) -> None:
        step, done = replica._engine.step, [0]

        def counted(last: bool = False) -> Any:
            done[0] += 1
            if done[0] == count:
                then(replica)
            return step(last)

        replica._engine.step = counted  # type: ignore[method-assign]

    return prepare


def test_stopped_after_any_step_it_is_gone_on_with(tmp_path: Path, undisturbed: dict[int, list[int]]) -> None:
    run_dir, manifest = make_run(tmp_path)
    for number, steps in enumerate((1, 2, 30, 50, 9)):
        assert not work(run_dir, manifest, f"r{number}", prepare=after_steps(steps, Replica.stop))
    assert work(run_dir, manifest, "last")
    assert rows_of(run_dir) == undisturbed
    assert decoded(run_dir) == ROWS * TOKENS, "no token twice"
    assert not os.listdir(run_dir.partials)


def test_time_that_is_up_is_a_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir, manifest = make_run(tmp_path)

    def slow(replica: Replica) -> None:
        step = replica._engine.step
        replica._engine.step = lambda last=False: (time.sleep(0.1), step(last))[1]  # type: ignore[method-assign]

    with caplog.at_level(logging.INFO):
        assert not work(run_dir, manifest, "a", left_s=3.0, prepare=slow)
    assert "the time of the job is up" in caplog.text
    assert run_dir.partial(0, 0).exists() and nobody_holds(run_dir, manifest)


def test_what_could_not_be_finished_is_not_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the 20th step on rows seem to take long, and less is left: what runs is finished, the rest given back."""
    run_dir, manifest = make_run(tmp_path)

    def seem_long(replica: Replica) -> None:
        replica._sink.totals.row_s = 110.0

    with caplog.at_level(logging.INFO):
        assert not work(run_dir, manifest, "a", left_s=100.0, prepare=after_steps(20, seem_long))
    assert "s are left, and a row takes 110 s: no further row is begun" in caplog.text
    done = len(run_dir.done_units())
    assert 1 <= done < len(manifest.units) and nobody_holds(run_dir, manifest)
    assert decoded(run_dir) % TOKENS == 0, "every row that was begun was finished"
    assert len(os.listdir(run_dir.partials)) <= 1, "finished rows of a unit that is not complete"


def test_longer_than_the_warning_nothing_is_held_back(tmp_path: Path) -> None:
    run_dir, manifest = make_run(tmp_path)

    def seem_endless(replica: Replica) -> None:
        replica._sink.totals.row_s = 3600.0

    assert work(run_dir, manifest, "a", left_s=1800.0, prepare=after_steps(20, seem_endless))


def test_a_full_disk_costs_what_was_to_be_saved_and_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, manifest = make_run(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchinfer.worker.sink.save_partial", full)
    assert not work(run_dir, manifest, "a", prepare=after_steps(5, Replica.stop))
    assert "is lost: [Errno 28] No space left on device" in caplog.text
    assert nobody_holds(run_dir, manifest)


def test_it_can_be_stopped_while_it_waits_for_others(tmp_path: Path) -> None:
    run_dir, manifest = make_run(tmp_path)
    other = ClaimBoard(run_dir, len(manifest.units), Identity.here("other"), 1e9)
    while other.claim() is not None:
        pass
    stopping: list[Replica] = []
    threading.Timer(1.0, lambda: stopping[0].stop()).start()
    assert not work(run_dir, manifest, "a", prepare=stopping.append)


def test_it_says_since_when_it_has_nothing_to_do(tmp_path: Path) -> None:
    """Another one holds a unit, and gives it back in the end: so it was not the end, and it works again."""
    run_dir, manifest = make_run(tmp_path)
    other = ClaimBoard(run_dir, len(manifest.units), Identity.here("other"), 1e9)
    held = other.claim()
    assert held is not None
    thread = threading.Thread(target=lambda: work(run_dir, manifest, "a"))
    thread.start()
    deadline = time.monotonic() + 30
    said: dict[str, Any] = {}
    while not (said.get("phase") == "waiting" and said["units_committed"] == len(manifest.units) - 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        said = read_progress(run_dir, "a")
    assert said["last_commit"] <= said["idle_since"] <= time.time()
    other.release(held)
    thread.join(30)
    assert len(rows_of(run_dir)) == ROWS and read_progress(run_dir, "a")["idle_since"] is None


def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hang: Callable[[threading.Event], None], phase: Phase) -> None:
    """Whatever a thread beside the loop hangs in, the pulse stops; and goes on with it."""
    run_dir, manifest = make_run(tmp_path)
    released, pulses = threading.Event(), []
    hang(released)
    finished = threading.Thread(target=lambda: work(run_dir, manifest, "a", prepare=lambda r: pulses.append(r._pulse)))
    finished.start()
    beats, still_since = -1, time.monotonic()
    deadline = time.monotonic() + 30
    looks_s = 1.5  # more than one look of the source for a unit
    while not pulses or time.monotonic() - still_since < looks_s or pulses[0].phase is not phase:
        assert time.monotonic() < deadline, "it goes on beating"
        if pulses and pulses[0]._beats != beats:
            beats, still_since = pulses[0]._beats, time.monotonic()
        time.sleep(0.02)
    released.set()
    finished.join(30)
    assert len(rows_of(run_dir)) == ROWS and pulses[0]._beats > beats


def test_a_last_commit_that_hangs_is_no_idling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(released: threading.Event) -> None:
        commit = sink.commit_unit
        monkeypatch.setattr(sink, "commit_unit", lambda *args: (released.wait(60), commit(*args))[1])

    watched(monkeypatch, tmp_path, hang, Phase.COMMITTING)


def test_an_input_that_cannot_be_read_on_is_no_idling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(released: threading.Event) -> None:
        read = UnitReader.read
        monkeypatch.setattr(UnitReader, "read", lambda self, unit: (released.wait(60), read(self, unit))[1])

    watched(monkeypatch, tmp_path, hang, Phase.IDLE)
