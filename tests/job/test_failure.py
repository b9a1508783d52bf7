"""What is left behind of a submission that failed, and by whom it is read."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer import publish
from batchinfer.job.failure import (
    RESERVE,
    RESERVE_BYTES,
    Cause,
    Failure,
    has_failed,
    newest_failure,
    publish_failure,
    read_failure,
    set_aside,
)
from batchinfer.job.rundir import RunDir

FAILURE = Failure("model.path=/m has no config.json", Cause.REQUEST, "01-0-0", "n1", "/run/log.txt", 12.5)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.submission(1).mkdir(parents=True)
    return run_dir


def test_the_first_failure_counts(run_dir: RunDir) -> None:
    assert read_failure(run_dir, 1) is None and not has_failed(run_dir, 1)
    assert publish_failure(run_dir, 1, FAILURE) and publish_failure(run_dir, 1, replace(FAILURE, node="n2"))
    assert read_failure(run_dir, 1) == newest_failure(run_dir) == FAILURE and has_failed(run_dir, 1)


def test_a_later_submission_begins_anew(run_dir: RunDir) -> None:
    publish_failure(run_dir, 1, FAILURE)
    run_dir.submission(2).mkdir()
    assert newest_failure(run_dir) is None and not has_failed(run_dir, 2)


def test_it_is_one_sentence_with_what_to_do(run_dir: RunDir) -> None:
    then = f"python -m batchinfer resume {run_dir.root}"
    assert FAILURE.sentence(run_dir) == (
        "model.path=/m has no config.json (found by replica 01-0-0 on n1; log: /run/log.txt); no other try is made; "
        f"put it right, then: {then}"
    )
    full = Failure.of_disk(run_dir, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "n1", "log")
    assert full.sentence(run_dir) == (
        f"output.dir={run_dir.root} cannot be written any more: Disk quota exceeded (found by n1; log: log); "
        f"what is committed stays; make room, then: {then}"
    )


def test_what_was_set_aside_makes_room_for_it(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of which the last byte is taken: only what is removed can be used again."""
    set_aside(run_dir, 1)
    reserve = run_dir.submission(1) / RESERVE
    assert reserve.stat().st_size == RESERVE_BYTES
    really_write = os.write

    def write(fd: int, data: bytes) -> int:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return really_write(fd, data)

    monkeypatch.setattr(publish.os, "write", write)
    assert publish_failure(run_dir, 1, FAILURE) and read_failure(run_dir, 1) == FAILURE


def test_where_nothing_can_be_written_it_says_so(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, data: bytes) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(publish.os, "write", write)
    assert not publish_failure(run_dir, 1, FAILURE)
    assert read_failure(run_dir, 1) is None
