from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchinfer.config import ConfigError
from batchinfer.job.rundir import FOLDERS, RunDir, parse_claim, parse_completion
from batchinfer.publish import temporary


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_create_makes_the_folders_and_may_be_repeated(run_dir: RunDir) -> None:
    run_dir.create()
    assert sorted(os.listdir(run_dir.root)) == sorted(FOLDERS)
    assert all(os.listdir(run_dir.root / name) == [] for name in FOLDERS)


def test_create_in_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"output\.dir: cannot make .*Not a directory"):
        RunDir(tmp_path / "file" / "run").create()

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="No space left"):
        RunDir(tmp_path / "run").create()


@pytest.mark.parametrize("unit, number", [(0, 0), (42, 1), (999_999, 0), (1_000_000, 12)])
def test_names_and_their_parsers_agree(run_dir: RunDir, unit: int, number: int) -> None:
    assert parse_completion(run_dir.completion(unit, number).name) == (unit, number)
    assert parse_claim(run_dir.claim(unit, number).name) == (unit, number)


OTHER_NAMES = [
    "42.0.parquet",
    "0000042.0.parquet",
    "000042.00.parquet",
    "000042.0.parquet.tmp",
    ".000042.0.parquet",
    "000042.parquet",
    "000042.0.json",
    "a",
    "\u0660\u0660\u0660\u0660\u0664\u0662.0.parquet",
    "000042.0.parquet\n",
]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_are_not_completions(name: str) -> None:
    assert parse_completion(name) is None


def test_done_units_takes_the_highest_generation(run_dir: RunDir) -> None:
    for unit, generation in ((0, 0), (1, 0), (1, 10), (1, 9), (7, 2)):
        run_dir.completion(unit, generation).touch()
    (run_dir.completions / "notes.txt").touch()
    temporary(run_dir.completion(3, 0)).touch()
    assert run_dir.done_units() == {0: 0, 1: 10, 7: 2}


def test_supersede_moves_lower_generations_and_may_be_repeated(run_dir: RunDir) -> None:
    for unit, generation in ((0, 0), (1, 0), (1, 1), (1, 2)):
        run_dir.completion(unit, generation).touch()
    run_dir.supersede()
    run_dir.supersede()
    assert sorted(os.listdir(run_dir.completions)) == ["000000.0.parquet", "000001.2.parquet"]
    assert sorted(os.listdir(run_dir.superseded)) == ["000001.0.parquet", "000001.1.parquet"]


def test_submissions_and_replicas_are_never_shared(run_dir: RunDir) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = sorted(pool.map(lambda _: run_dir.new_submission()[0], range(20)))
        names = set(pool.map(lambda _: run_dir.new_replica("node1-0"), range(20)))
    assert numbers == list(range(1, 21))
    assert names == {"node1-0"} | {f"node1-0.{i}" for i in range(1, 20)}
    number, folder = run_dir.new_submission()
    assert (number, folder.name, folder.is_dir()) == (21, "21", True)


def test_cancel_stops_submissions_so_far_and_no_later_one(run_dir: RunDir) -> None:
    assert not run_dir.is_cancelled(1)
    run_dir.cancel(2)
    run_dir.cancel(1)  # never takes back
    assert [run_dir.is_cancelled(n) for n in (1, 2, 3)] == [True, True, False]


def test_clean_temporaries_removes_ours_only(run_dir: RunDir) -> None:
    ours = [temporary(run_dir.completion(3, 0)), temporary(run_dir.claim(3, 0)), temporary(run_dir.manifest_json)]
    others = [run_dir.completion(3, 0), run_dir.completions / ".hidden", run_dir.root / ".nfs01.tmp", run_dir.stats / "a.tmp"]
    for path in ours + others:
        path.touch()
    assert run_dir.clean_temporaries() == 3
    assert not any(p.exists() for p in ours) and all(p.exists() for p in others)
