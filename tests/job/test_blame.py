"""Whose fault a hopeless death is, from what the other replicas of the submission say of themselves."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from batchinfer.job import blame
from batchinfer.job.blame import PATIENCE_S, Inquiry, Verdict, examined, failure_of
from batchinfer.job.failure import Cause
from batchinfer.job.replica import FULL, HOPELESS, Death, write_death
from batchinfer.job.rundir import RunDir


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.replicas.mkdir()
    return run_dir


@pytest.fixture
def clock() -> Clock:
    return Clock()


def death(run_dir: RunDir, name: str = "01-0-0", code: int = HOPELESS) -> Death:
    found = Death(name, code, "model.path=/m has no config.json", "log.txt", node="n1", early=True, undecided=True)
    run_dir.replica(name).mkdir()
    write_death(run_dir, found)
    return found


def says(run_dir: RunDir, name: str, phase: str | None) -> None:
    run_dir.replica(name).mkdir(exist_ok=True)
    if phase is not None:
        run_dir.progress(name).write_text(json.dumps({"phase": phase}))


def opened(run_dir: RunDir, clock: Clock, code: int = HOPELESS) -> Inquiry:
    case = Inquiry(run_dir, 1, clock)
    case.open(death(run_dir, code=code))
    return case


def test_alone_it_is_the_request(run_dir: RunDir, clock: Clock) -> None:
    says(run_dir, "02-0-0", "running")  # of another submission, which asks for something else
    says(run_dir, "01-0-1", "stopped")  # before this job was put back into the queue: things may have changed since
    assert opened(run_dir, clock).judge() is Verdict.REQUEST


def test_its_own_word_is_not_waited_for_where_it_could_not_be_written(run_dir: RunDir, clock: Clock) -> None:
    case = Inquiry(run_dir, 1, clock)
    says(run_dir, "01-0-0", "loading")
    case.open(Death("01-0-0", HOPELESS, "Read-only file system", "log.txt"))
    assert case.judge() is Verdict.REQUEST


@pytest.mark.parametrize("phase", ["running", "waiting", "done"])
def test_where_another_works_it_is_the_node(run_dir: RunDir, clock: Clock, phase: str) -> None:
    says(run_dir, "01-1-0", phase)
    assert opened(run_dir, clock).judge() is Verdict.NODE


@pytest.mark.parametrize("phase", [None, "starting", "loading", "failed"])
def test_others_that_are_on_their_way_are_waited_for(run_dir: RunDir, clock: Clock, phase: str | None) -> None:
    says(run_dir, "01-1-0", phase)
    case = opened(run_dir, clock)
    assert case.judge() is None
    clock.now += 1
    assert case.judge() is None
    death(run_dir, "01-2-0")
    write_death(run_dir, Death("01-1-0", HOPELESS, "the same", "log.txt"))
    clock.now += 1
    assert case.judge() is Verdict.REQUEST, "all of them died"


def test_who_loads_for_long_works(run_dir: RunDir, clock: Clock) -> None:
    """A large model takes minutes, and nobody's node is to stand idle for it."""
    says(run_dir, "01-1-0", "loading")
    case = opened(run_dir, clock)
    clock.now += PATIENCE_S - 1
    assert case.judge() is None
    clock.now += 1
    assert case.judge() is Verdict.NODE


def test_a_job_that_runs_and_has_no_replica_yet_is_waited_for(
    run_dir: RunDir, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = opened(run_dir, clock)
    monkeypatch.setattr(blame, "running_jobs", lambda: [0, 3])
    assert case.judge() is None
    says(run_dir, "01-3-0", "running")
    clock.now += 1
    assert case.judge() is Verdict.NODE


def test_a_full_disk_is_full_for_all(run_dir: RunDir, clock: Clock) -> None:
    says(run_dir, "01-1-0", "running")
    assert opened(run_dir, clock, FULL).judge() is Verdict.REQUEST


@pytest.mark.parametrize(
    ("reason", "early", "code"),
    [
        ("rank 1: ModuleNotFoundError: No module named 'tokenizers'", True, HOPELESS),
        ("python: Error while finding module specification (ModuleNotFoundError: No module named 'torch')", True, HOPELESS),
        ("ImportError: libcudart.so.13: cannot open shared object file", True, HOPELESS),
        ("ImportError: libcudart.so.13: cannot open shared object file", False, 1),  # it has worked
        ("RuntimeError: something broke", True, 1),
    ],
)
def test_what_is_not_installed(run_dir: RunDir, reason: str, early: bool, code: int) -> None:
    assert examined(run_dir, Death("01-0-0", 1, reason, "log.txt", early=early)).exit_code == code


def test_a_disk_that_cannot_be_written_is_the_reason(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came through to the log."""
    died = Death("01-0-0", 1, "exit code 1 without a word", "log.txt")
    assert examined(run_dir, died) == died
    for code, expected, cause in ((errno.EDQUOT, FULL, Cause.DISK), (errno.EROFS, HOPELESS, Cause.REQUEST)):
        monkeypatch.setattr(blame, "lasting_error", lambda folder, code=code: OSError(code, "so it is"))
        found = examined(run_dir, died)
        assert (found.exit_code, found.reason) == (expected, f"output.dir={run_dir.root} cannot be written any more: so it is")
        assert failure_of([Death("01-0-1", HOPELESS, "another", "log.txt"), found]).cause is cause
    killed = Death("01-0-0", -9, "killed by SIGKILL", "log.txt")
    assert examined(run_dir, killed) == killed
