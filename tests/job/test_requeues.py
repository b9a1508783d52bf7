"""A job near its end: who stops when, what is requeued and how often, and that cancelled is cancelled."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import submitit

from batchinfer.job.node import NodeJob
from batchinfer.job.process import marked
from batchinfer.job.replica import mark_of_job
from batchinfer.job.requeues import count_requeues, record_start
from batchinfer.job.rundir import RunDir
from batchinfer.job.walltime import RESERVE_S, Walltime, seconds_left
from tests.job.test_launch_node import eventually, in_background, make_run, node_job, worker

STOPS_WHEN_TOLD = "signal.signal(15, lambda *_: os._exit(3)); say(ready=1); time.sleep(100)"
STOPS_IN_TIME = 'time.sleep(max(0, float(os.environ["BATCHINFER_WORK_UNTIL"]) - time.time())); os._exit(3)'
OUTSIDE = {"PATH": os.environ["PATH"]}  # of SLURM


def ready(run_dir: RunDir, replica: str) -> bool:
    progress = run_dir.progress(replica)
    return progress.exists() and "ready" in progress.read_text()


def with_handler(job: NodeJob) -> subprocess.Popen[bytes]:
    """The job with a handler of SIGUSR2 as submitit's, which says by 77 that it was handed over."""
    handler = "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(77))"
    program = f"import signal, sys; from batchinfer.job.node import NodeJob\n{handler}\nsys.exit({job!r}())"
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)


def test_time_is_shared_out() -> None:
    now = time.time()
    walltime = Walltime.of_this_job(3600, 120, OUTSIDE)
    assert walltime.ends == pytest.approx(now + 3600, abs=5) and walltime.work_until == walltime.ends - RESERVE_S
    assert not walltime.explains_warning() and not walltime.is_over
    near = Walltime.of_this_job(150, 120, OUTSIDE)
    assert near.explains_warning() and not near.is_over
    assert Walltime.of_this_job(5, 120, OUTSIDE).is_over
    short = Walltime.of_this_job(10, 4, OUTSIDE)
    assert short.work_until == short.ends - 2 and not short.is_over
    endless = Walltime.of_this_job(None, 120, OUTSIDE)
    assert endless.work_until == math.inf and not endless.explains_warning() and not endless.is_over


def test_slurm_knows_the_end(tmp_path: Path) -> None:
    fake = tmp_path / "squeue"
    fake.write_text('#!/bin/sh\n[ "$3" = 42 ] && echo 1-02:03:04\n')
    fake.chmod(0o755)
    environ = {"SLURM_JOB_ID": "42"}
    assert Walltime.of_this_job(60, 10, {**environ, "SLURM_JOB_END_TIME": "1000"}).ends == 1000
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{tmp_path}:{path}"
    try:
        known = Walltime.of_this_job(None, 10, environ)
        unknown = Walltime.of_this_job(None, 10, {"SLURM_JOB_ID": "43"})
    finally:
        os.environ["PATH"] = path
    assert known.left_s == pytest.approx(((24 + 2) * 60 + 3) * 60 + 4, abs=5)
    assert unknown.ends == math.inf


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:07\n", 7), ("59:01", 3541), ("1:00:00", 3600), ("2-00:00:10", 172810), ("UNLIMITED", math.inf), ("", math.inf)],
)
def test_what_squeue_says_is_left(text: str, seconds: float) -> None:
    assert seconds_left(text) == seconds


def test_requeues_are_counted_over_all_jobs(tmp_path: Path) -> None:
    assert count_requeues(tmp_path) == 0
    for job in (0, 1, 0, 12, 1, 0):
        record_start(tmp_path, job)
    (tmp_path / "job-00.json").write_text("{}")
    assert count_requeues(tmp_path) == 3
    assert len(list(tmp_path.glob("job-00-start-00[012].json"))) == 3


def test_far_from_the_end_a_warning_stops_at_once(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    process = with_handler(node_job(run_dir, worker(tmp_path, STOPS_WHEN_TOLD), time_limit_s=3600.0, warning_s=10.0))
    eventually(lambda: ready(run_dir, "01-0-0"))
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == 77


def test_near_the_end_a_warning_leaves_replicas_their_time(tmp_path: Path) -> None:
    """They end by themselves, before the job would stop them; one that does not is stopped."""
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, "say(ready=1); " + STOPS_IN_TIME), time_limit_s=8.0, warning_s=6.0)
    begin, process = time.monotonic(), with_handler(job)
    eventually(lambda: ready(run_dir, "01-0-0"))
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 77
    assert 5 <= time.monotonic() - begin < 20


def test_whoever_does_not_stop_in_time_is_stopped(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    stubborn = "signal.signal(15, signal.SIG_IGN); say(ready=1); time.sleep(100)"
    process = with_handler(node_job(run_dir, worker(tmp_path, stubborn), time_limit_s=5.0, warning_s=4.0))
    assert process.wait(40) == 77
    assert marked(mark_of_job(run_dir, 1)) == []


def test_out_of_time_without_a_warning_it_is_handed_over(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    process = with_handler(node_job(run_dir, worker(tmp_path, STOPS_IN_TIME), time_limit_s=4.0, warning_s=2.0))
    assert process.wait(40) == 77
    assert not (run_dir.submissions / "01" / "died.json").exists()


def test_requeues_end_with_a_sentence(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, STOPS_WHEN_TOLD), max_requeues=2)
    codes, said = [], b""
    for name in ("01-0-0", "01-0-0.1", "01-0-0.2"):
        process = with_handler(job)
        eventually(lambda name=name: ready(run_dir, name))  # type: ignore[misc]
        process.send_signal(signal.SIGUSR2)
        said = process.communicate(timeout=30)[1]
        codes.append(process.returncode)
    assert codes == [77, 77, 3]
    assert b"have been requeued launcher.max_requeues=2 times; it ends here; finish the run with: " in said
    again = with_handler(job)  # as SLURM itself may do
    assert b"launcher.max_requeues=2 times" in again.communicate(timeout=30)[1] and again.returncode == 3
    assert len(os.listdir(run_dir.replicas)) == 3, "nothing was begun"


def test_cancelled_it_is_not_requeued(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    body = "signal.signal(15, lambda *_: (time.sleep(0.3), os._exit(3))); say(ready=1); time.sleep(100)"
    process = with_handler(node_job(run_dir, worker(tmp_path, body), grace_s=10.0))
    eventually(lambda: ready(run_dir, "01-0-0"))
    run_dir.cancel(1)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 3


def test_submitit_puts_it_back_and_starts_it_again(tmp_path: Path) -> None:
    """Its local executor: a time limit, a warning, a checkpoint, another start; and no more of them than are allowed."""
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, STOPS_IN_TIME), time_limit_s=6.0, warning_s=4.0, max_requeues=1)
    executor = submitit.LocalExecutor(folder=tmp_path / "submitit", max_num_timeout=10)
    executor.update_parameters(timeout_min=6 / 60, signal_delay_s=4, stderr_to_stdout=True)
    placed: Any = executor.submit(job)
    assert placed.result() == 3
    assert sorted(os.listdir(run_dir.replicas)) == ["01-0-0", "01-0-0.1"]
    said = placed.stdout()
    assert "have been requeued launcher.max_requeues=1 times" in said
    starts = sorted((run_dir.submissions / "01").glob("job-00-start-*.json"))
    assert len(starts) == 2 and json.loads(starts[0].read_text())["host"]


def test_a_job_in_the_background_is_told_until_when(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    process = in_background(node_job(run_dir, worker(tmp_path, "commit(0); sys.exit(0)")))
    assert process.wait(30) == 0
    assert json.loads((run_dir.replica("01-0-0") / "env.json").read_text())["BATCHINFER_WORK_UNTIL"] == "inf"
