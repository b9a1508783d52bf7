"""A node's job with a small fake worker: starts, deaths, restarts, stops, and that nobody is left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from batchinfer.config import from_dict
from batchinfer.data.reader import InputSet
from batchinfer.data.schema import FOOTER_KEY, RowRange, Shard, UnitFooter
from batchinfer.job import left_out, node
from batchinfer.job.failure import Cause, Failure, publish_failure, read_failure
from batchinfer.job.manifest import Manifest
from batchinfer.job.node import NodeJob
from batchinfer.job.process import marked
from batchinfer.job.replica import (
    BEREAVED,
    FULL,
    HOPELESS,
    RankFailure,
    first_failure,
    last_words,
    mark_of_job,
    read_death,
)
from batchinfer.job.rundir import RunDir

WORKER = """
    import dataclasses, json, os, signal, subprocess, sys, time
    import pyarrow as pa, pyarrow.parquet as pq
    from pathlib import Path
    run, name = Path(sys.argv[1]), sys.argv[sys.argv.index("--replica") + 1]
    def say(**progress):
        (run / "replicas" / name / "progress.json").write_text(json.dumps(progress))
    def commit(unit):
        footer = dict(schema_version=2, unit=unit, generation=0, rows=2, samples=2, prompt_tokens=4,
                      completion_tokens=6, errors={}, content_hash="", input_hash="", replica=name, versions={})
        columns = dict(finish_reason=["stop", "stop"], ttft_s=[0.1, 0.2], latency_s=[0.5, 1.0], num_completion_tokens=[3, 3],
                       shard=["a", "a"], row=[0, 1], sample=[0, 0], completion=["Hello", "World"],
                       error=pa.nulls(2, pa.string()), error_message=pa.nulls(2, pa.string()))
        table = pa.table(columns).replace_schema_metadata({"batchinfer": json.dumps(footer)})
        pq.write_table(table, run / "completions" / f"{unit:06d}.0.parquet")
    def child():
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    (run / "replicas" / name / "env.json").write_text(json.dumps(dict(os.environ)))
    say(beat=1, phase="running", error=None)
"""

CHECKED = {"model": {"path": "checkpoint"}, "input": {"paths": ["in"], "prompt_column": "prompt"}}  # what the config insists on


def worker(folder: Path, body: str) -> tuple[str, ...]:
    path = folder / "fake_worker.py"
    path.write_text(textwrap.dedent(WORKER) + textwrap.dedent(body))
    return (sys.executable, str(path))


def make_run(root: Path, units: int = 1) -> RunDir:
    run_dir = RunDir(root / "run")
    shard = Shard("a.parquet", 1, 2 * units, "")
    ranges = [(RowRange(0, 2 * i, 2 * i + 2),) for i in range(units)]
    config = from_dict({"run_name": "test", "hw": {"gpu": None, "tensor_parallel": 1}, **CHECKED})
    Manifest.create(run_dir, config, InputSet(root, (shard,), pa.schema([])), [], ranges, {})
    return run_dir


def node_job(run_dir: RunDir, command: tuple[str, ...], **changes: object) -> NodeJob:
    number, _ = run_dir.new_submission()
    job = NodeJob(str(run_dir.root), number, 0, replicas=1, tensor_parallel=1, visible_devices=(), grace_s=1.0, command=command)
    return replace(job, **changes)  # type: ignore[arg-type]


def eventually(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def in_background(job: NodeJob) -> subprocess.Popen[bytes]:
    """The job in a process of its own, as submitit runs it."""
    program = f"import sys; from batchinfer.job.node import NodeJob; sys.exit({job!r}())"
    return subprocess.Popen([sys.executable, "-c", program])


def test_complete_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, units=2)
    body = "commit(int(name.split('-')[2])); print('hello'); sys.exit(0)"
    devices = ("GPU-a", "MIG-b")
    job = node_job(run_dir, worker(tmp_path, body), replicas=2, visible_devices=devices, cpus_per_rank=3, env={"X": "1"})
    assert job() == 0
    seen = [json.loads((run_dir.replica(f"01-0-{k}") / "env.json").read_text()) for k in range(2)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["GPU-a", "MIG-b"]
    assert {(env["OMP_NUM_THREADS"], env["X"]) for env in seen} == {("3", "1")}
    assert "hello" in (run_dir.replica("01-0-1") / "log.txt").read_text()


def test_death_before_a_commit_is_not_restarted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, "print('weights are missing', file=sys.stderr); sys.exit(1)"))
    assert job() == 1
    death = read_death(run_dir, "01-0-0")
    assert death and (death.reason, death.exit_code, death.restarted_as) == ("weights are missing", 1, None)
    assert os.listdir(run_dir.replicas) == ["01-0-0"]
    assert "weights are missing" in (said := capfd.readouterr().err) and str(run_dir.replica("01-0-0") / "log.txt") in said


def test_death_after_a_commit_is_restarted_twice(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, units=9)
    body = "commit(len(os.listdir(run / 'completions'))); say(error='it broke'); os.kill(os.getpid(), 9)"
    assert node_job(run_dir, worker(tmp_path, body))() == 1
    assert sorted(os.listdir(run_dir.replicas)) == ["01-0-0", "01-0-0.1", "01-0-0.2"]
    first, last = read_death(run_dir, "01-0-0"), read_death(run_dir, "01-0-0.2")
    assert first and (first.restarted_as, first.reason, first.exit_code) == ("01-0-0.1", "it broke", -9)
    assert last and last.restarted_as is None


def test_restarted_replica_that_completes_the_run_is_success(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, units=2)
    body = "n = len(os.listdir(run / 'completions')); commit(n); sys.exit(1 if n == 0 else 0)"
    assert node_job(run_dir, worker(tmp_path, body))() == 0


def test_sigterm_lets_the_worker_stop(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    body = """
        signal.signal(signal.SIGTERM, lambda *_: (say(phase="done", stopped=True), os._exit(3)))
        say(phase="running", ready=True)
        time.sleep(100)
    """
    process = in_background(node_job(run_dir, worker(tmp_path, body), grace_s=10.0))
    progress = run_dir.progress("01-0-0")
    eventually(lambda: progress.exists() and "ready" in progress.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3
    assert json.loads(progress.read_text())["stopped"]


def test_worker_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, "signal.signal(15, signal.SIG_IGN); child(); say(ready=1); time.sleep(100)"))
    process = in_background(job)
    progress, mark = run_dir.progress("01-0-0"), mark_of_job(run_dir, 1)
    eventually(lambda: progress.exists() and "ready" in progress.read_text())
    assert len(marked(mark)) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 3
    assert marked(mark) == []


def test_killed_job_takes_its_replicas_along(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    process = in_background(node_job(run_dir, worker(tmp_path, "time.sleep(100)")))
    eventually(lambda: run_dir.progress("01-0-0").exists())
    process.kill()
    process.wait()
    eventually(lambda: not marked(mark_of_job(run_dir, 1)))


def test_killed_torchrun_leaves_no_rank(tmp_path: Path) -> None:
    """The command stands for torchrun, its child in another session for a rank."""
    run_dir = make_run(tmp_path)
    assert node_job(run_dir, worker(tmp_path, "child(); os.kill(os.getpid(), signal.SIGKILL)"))() == 1
    assert marked(mark_of_job(run_dir, 1)) == []
    death = read_death(run_dir, "01-0-0")
    assert death and "SIGKILL" in death.reason


def test_warning_signal_stops_and_hands_over(tmp_path: Path) -> None:
    """SIGUSR2 to everybody, as SLURM sends it: the worker survives it, is stopped, and only then submitit's handler runs."""
    run_dir = make_run(tmp_path)
    body = "signal.signal(15, lambda *_: (say(stopped=1), os._exit(3))); say(ready=1); time.sleep(100)"
    job = node_job(run_dir, worker(tmp_path, body), grace_s=10.0)
    program = (
        "import signal, sys; from batchinfer.job.node import NodeJob\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(77))\n"
        f"sys.exit({job!r}())"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    progress = run_dir.progress("01-0-0")
    eventually(lambda: progress.exists() and "ready" in progress.read_text())
    for pid in [*marked(mark_of_job(run_dir, 1)), process.pid]:
        os.kill(pid, signal.SIGUSR2)
    assert process.wait(20) == 77
    assert "stopped" in progress.read_text()


def test_checkpoint_is_the_same_job(tmp_path: Path) -> None:
    job = node_job(make_run(tmp_path), ("true",))
    assert job.checkpoint().function == job


def test_cancelled_run_is_stopped_and_not_started_again(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, "time.sleep(100)"))
    process = in_background(job)
    eventually(lambda: run_dir.progress("01-0-0").exists())
    run_dir.cancel(1)
    assert process.wait(20) == 3
    assert job() == 3
    assert os.listdir(run_dir.replicas) == ["01-0-0"]


def test_too_few_devices_is_said(tmp_path: Path) -> None:
    job = node_job(make_run(tmp_path), ("true",), replicas=2, visible_devices=("0",))
    assert job() == 1
    failure = read_failure(RunDir(Path(job.run_dir)), 1)
    assert failure is not None and "job 0 needs 2 GPUs (2 replicas of 1), but " in failure.reason


def test_a_hopeless_death_ends_the_submission(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Though it had committed something: an exit code says that no other try would do."""
    run_dir = make_run(tmp_path, units=3)
    body = f"commit(len(os.listdir(run / 'completions'))); print('batchinfer: the input changed'); sys.exit({HOPELESS})"
    job = node_job(run_dir, worker(tmp_path, body))
    assert job() == 1
    assert os.listdir(run_dir.replicas) == ["01-0-0"] and len(run_dir.done_units()) == 1
    failure = read_failure(run_dir, 1)
    assert failure is not None
    assert (failure.reason, failure.cause, failure.replica) == ("the input changed", Cause.REQUEST, "01-0-0")
    said = capfd.readouterr().err
    assert said == f"batchinfer: {failure.sentence(run_dir)}\n"
    assert replace(job, job=1)() == 1 and os.listdir(run_dir.replicas) == ["01-0-0"], "it starts no replica any more"
    assert node_job(run_dir, worker(tmp_path, "commit(len(os.listdir(run / 'completions')))"))() == 0, "another submission does"


def test_a_job_stops_when_another_finds_the_submission_failed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    body = "signal.signal(15, lambda *_: (say(stopped=1), os._exit(3))); say(ready=1); time.sleep(100)"
    process = in_background(node_job(run_dir, worker(tmp_path, body), grace_s=10.0))
    progress = run_dir.progress("01-0-0")
    eventually(lambda: progress.exists() and "ready" in progress.read_text())
    publish_failure(run_dir, 1, Failure("it cannot be", Cause.REQUEST, "01-1-0", "n2", "log.txt"))
    assert process.wait(20) == 1
    assert "stopped" in progress.read_text()


def test_where_the_same_works_elsewhere_the_submission_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, f"sys.exit({HOPELESS})"))
    run_dir.replica("01-1-0").mkdir()
    run_dir.progress("01-1-0").write_text(json.dumps({"phase": "running", "process": {"host": "n2"}}))
    assert job() == 1
    assert read_failure(run_dir, 1) is None
    death = read_death(run_dir, "01-0-0")
    assert death and death.early and not death.undecided and death.sentence() in capfd.readouterr().err


def test_a_full_disk_is_told_although_no_log_takes_it(tmp_path: Path) -> None:
    """Others work still, and will find it full too."""
    run_dir = make_run(tmp_path)
    word = f"Path(os.environ['BATCHINFER_VITALS'], 'word-rank0.json').write_text(json.dumps([{FULL}, 'no space'])); sys.exit(1)"
    job = node_job(run_dir, worker(tmp_path, word))
    run_dir.replica("01-1-0").mkdir()
    run_dir.progress("01-1-0").write_text(json.dumps({"phase": "running"}))
    assert job() == 1
    failure = read_failure(run_dir, 1)
    assert failure is not None and (failure.reason, failure.cause) == ("no space", Cause.DISK)


def test_a_job_that_cannot_begin_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own files nor the failure can be written: SLURM is told to end the others, and how this one ended."""
    run_dir = make_run(tmp_path)
    job = node_job(run_dir, worker(tmp_path, ""))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "job-00.json")

    asked: list[list[str]] = []
    monkeypatch.setattr(node, "record_start", full)
    monkeypatch.setattr(node, "lasting_error", lambda folder: OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(node, "publish_failure", lambda *_: False)
    monkeypatch.setattr(left_out.subprocess, "run", lambda command, **_: asked.append(command) or Answer)
    for name, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_ARRAY_JOB_ID", "12"), ("SLURM_ARRAY_TASK_ID", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        job()
    assert caught.value.code == FULL
    assert [command for command in asked if command[0] == "scancel"] == [
        ["scancel", "--state=PENDING", "12"],
        ["scancel", "12_0"],
    ]


class Answer:
    stdout = "0\n1\n"


def test_real_torchrun_tells_the_ranks_words(tmp_path: Path) -> None:
    """Through torch.distributed.run: arguments arrive, exit code and sentence are those of the rank that failed."""
    run_dir = make_run(tmp_path)
    (tmp_path / "fake_rank.py").write_text(
        "import sys, os\nprint('args', sys.argv[1:])\nprint(f'rank {os.environ[\"RANK\"]} of {os.environ[\"WORLD_SIZE\"]}')\n"
        "if os.environ['RANK'] == '1': sys.exit('batchinfer: no such file: model.safetensors')\nimport time; time.sleep(100)\n"
    )
    job = node_job(run_dir, (), tensor_parallel=2, worker_module="fake_rank", env={"PYTHONPATH": str(tmp_path)})
    assert replace(job, command=None)() == 1
    death = read_death(run_dir, "01-0-0")
    assert death and (death.exit_code, death.reason) == (1, "rank 1: no such file: model.safetensors")
    log = (run_dir.replica("01-0-0") / "log.txt").read_text()
    assert "[rank0]:rank 0 of 2" in log and f"'{run_dir.root}', '--replica', '01-0-0', '--submission', '1'" in log


def test_last_words_prefer_the_rank_that_failed_first() -> None:
    log = "[rank1]:out of memory\n[rank0]:stopped\nRoot Cause:\n  rank      : 1 (local_rank: 1)\n  exitcode  : 1\n====\n"
    assert last_words(log) == "out of memory"
    assert last_words("torchrun: no such module\n\n") == "torchrun: no such module"
    assert last_words("") is None
    told = "[rank0]:batchinfer: the disk is full\n[rank0]:Traceback (most recent call last):\n[rank0]:  File x\n"
    assert last_words(told) == "the disk is full"
    assert last_words("[rank0]:loaded\n[rank0]:Traceback (most recent call last):\n") == "loaded"


def failures(*ranks: tuple[int, int]) -> str:
    """What torchrun says of (rank, exit code), the one that it takes for the root cause last."""
    said = [f"  time      : now\n  rank      : {r} (local_rank: {r})\n  exitcode  : {code} (pid: 7)\n" for r, code in ranks]
    return "Failures:\n" + "".join(said[:-1]) + "Root Cause (first observed failure):\n" + said[-1]


@pytest.mark.parametrize(
    ("ranks", "culprit"),
    [
        ([(1, -9)], RankFailure(1, -9, False)),
        ([(0, BEREAVED), (1, -9)], RankFailure(1, -9, True)),
        ([(1, -9), (0, BEREAVED)], RankFailure(1, -9, True)),  # both within one look of torchrun
        ([(0, -15), (2, 1), (1, BEREAVED)], RankFailure(2, 1, True)),
        ([(0, 1), (1, 1)], RankFailure(1, 1, True)),
        ([(1, BEREAVED), (0, -15)], RankFailure(0, -15, True)),  # somebody ended it by hand
    ],
)
def test_the_culprit_is_who_failed_of_itself(ranks: list[tuple[int, int]], culprit: RankFailure) -> None:
    assert first_failure(failures(*ranks)) == culprit
    assert first_failure("loaded\n") is None


@pytest.mark.parametrize(
    ("code", "words", "reason"),
    [
        (-9, "loaded", "rank 1 was killed by SIGKILL; often the host ran out of memory"),
        (-11, "loaded", "rank 1 was killed by SIGSEGV"),
        (-6, "terminate called: no memory", "rank 1: terminate called: no memory"),
        (1, "batchinfer: OutOfMemoryError: 3 GiB", "rank 1: OutOfMemoryError: 3 GiB"),
    ],
)
def test_the_reason_is_the_culprits(tmp_path: Path, code: int, words: str, reason: str) -> None:
    """Whatever rank 0 says of the connection that it lost."""
    run_dir = make_run(tmp_path)
    body = f"""
        say(error="RuntimeError: connection reset")
        print("[rank1]:" + {words!r})
        print("[rank0]:batchinfer: RuntimeError: connection reset")
        print({failures((1, code), (0, BEREAVED))!r})
        sys.exit(1)
    """
    assert node_job(run_dir, worker(tmp_path, body))() == 1
    death = read_death(run_dir, "01-0-0")
    assert death and (death.exit_code, death.reason) == (code, reason)


def test_footer_of_the_fake_is_the_real_one() -> None:
    assert FOOTER_KEY == b"batchinfer" and "replica" in UnitFooter.__dataclass_fields__
