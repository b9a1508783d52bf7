"""What may happen to a run besides kill -9 of all of it: Ctrl-C, a stopped worker, a lost job, a full disk, damaged files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.run.jobs import batchinfer, kill, processes_of, start, wait_until_gone

REQUEST = ["hw=cpu", "input.limit=64", "input.rows_per_unit=4", "sampling.max_tokens=48", "engine.max_num_seqs=32"]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def committed(run_dir: Path) -> int:
    return len(list((run_dir / "completions").glob("[0-9]*.parquet")))


def pids_of(run_dir: Path, words: str) -> list[int]:
    return [pid for pid, command in processes_of(run_dir).items() if words in command]


def finish(run_dir: Path) -> None:
    for verb in ("resume", "verify"):
        done = batchinfer(verb, run_dir)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder]).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_ctrl_c_stops_everything_and_status_says_so(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = start(*REQUEST, "launcher=local", f"output.dir={run_dir}", log=log)
    wait_for(lambda: committed(run_dir))
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    assert job.wait(timeout=30) == 130, log.read_text()
    assert not wait_until_gone(run_dir, 5)
    said = batchinfer("status", run_dir).stdout
    assert "01-0-0: stopped, " in said and "not yet committed" not in said
    finish(run_dir)


def test_a_lost_job_is_named(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = start(*REQUEST, "launcher=local", f"output.dir={run_dir}", log=log)
    wait_for(lambda: committed(run_dir))
    kill(pids_of(run_dir, "submitit.core._submit"))
    assert job.wait(timeout=30) == 1
    assert "was killed before its end; log: " in log.read_text()
    assert not wait_until_gone(run_dir, 5)


def test_a_killed_worker_is_called_killed(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = start(*REQUEST, "launcher=inline", f"output.dir={run_dir}", log=log)
    wait_for(lambda: pids_of(run_dir, "-u -m batchinfer.worker"))
    kill(pids_of(run_dir, "-u -m batchinfer.worker"))
    assert job.wait(timeout=30) == 1
    said = [line for line in log.read_text().splitlines() if line.startswith("replica 01-0-0 died")]
    assert len(said) == 1 and "(killed by SIGKILL; " in said[0] and "not restarted; log: " in said[0]


@pytest.mark.slow
def test_a_worker_that_stood_still_loses_quietly(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [*REQUEST, "launcher=inline", "engine.stall_timeout_s=4", f"output.dir={run_dir}"]
    first = start(*command, log=tmp_path / "first")
    wait_for(lambda: committed(run_dir))
    (worker,) = pids_of(run_dir, "-u -m batchinfer.worker")
    for pid in (first.pid, worker):  # with its job, as when the host sleeps: so nobody sees it stand still
        os.kill(pid, signal.SIGSTOP)
    second = start(*command, log=tmp_path / "second")
    wait_for(lambda: committed(run_dir) >= 8, 60)  # far more than the stopped one left free
    for pid in (first.pid, worker):
        os.kill(pid, signal.SIGCONT)
    assert [job.wait(timeout=90) for job in (first, second)] == [0, 0], (tmp_path / "first").read_text()
    assert " died (" not in (tmp_path / "first").read_text()
    assert batchinfer("verify", run_dir).returncode == 0


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    return ballast


def test_a_full_disk_is_one_sentence_and_resumed_from(small_disk: Path, tmp_path: Path) -> None:
    run_dir, log = small_disk / "run", tmp_path / "log"
    job = start(*REQUEST, "engine.max_num_seqs=4", "launcher=local", f"output.dir={run_dir}", log=log)
    wait_for(lambda: committed(run_dir))
    ballast = fill(small_disk)
    assert job.wait(timeout=60) == 1
    there, said = committed(run_dir), log.read_text()
    assert 0 < there < 22, "it was in the middle"
    cannot = f"batchinfer: output.dir={run_dir} cannot be written any more: No space left on device ("
    assert said.count("batchinfer: ") == said.count(cannot) == 1 and "Traceback" not in said, said
    assert f"what is committed stays; make room, then: python -m batchinfer resume {run_dir}\n" in said
    ballast.unlink()
    finish(run_dir)


def test_damaged_files_are_named_and_never_crash(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    made = batchinfer("input.limit=12", "hw=cpu", "sampling.max_tokens=4", "launcher=inline", f"output.dir={run_dir}")
    assert made.returncode == 0, made.stderr
    torn = sorted((run_dir / "completions").glob("[0-9]*.parquet"))[0]
    torn.write_bytes(torn.read_bytes()[:100])
    for verb, code in (("status", 2), ("report", 2), ("resume", 2), ("verify", 1)):
        done = batchinfer(verb, run_dir)
        assert done.returncode == code and torn.name in done.stdout + done.stderr, (verb, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
    torn.unlink()
    for claim in (run_dir / "claims").glob("0*.json"):
        claim.write_bytes(b"")
    (run_dir / "replicas" / "01-0-0" / "progress.json").write_bytes(b"{")
    (run_dir / "replicas" / "note.txt").write_bytes(b"not a replica")
    (run_dir / "stats" / "note.txt").write_bytes(b"not a segment")
    finish(run_dir)
