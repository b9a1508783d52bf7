"""Placing jobs: locally through submitit, inline, and as sbatch text; interrupting and cancelling them."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchinfer import hardware
from batchinfer.config import Config, ConfigError, from_dict
from batchinfer.data.reader import InputSet
from batchinfer.data.schema import RowRange, Shard
from batchinfer.job import launch
from batchinfer.job.launch import cancel_jobs, check_placeable, make_jobs, resolve_kind, run_job, stop_signals
from batchinfer.job.manifest import Manifest
from batchinfer.job.placing import slurm_failures
from batchinfer.job.process import marked
from batchinfer.job.replica import mark_of_job
from batchinfer.job.rundir import RunDir
from tests.test_report import EXPECTED

GOLDEN = Path(__file__).parent / "golden.sbatch"
CHECKED = {"model": {"path": "checkpoint"}, "input": {"paths": ["in"], "prompt_column": "prompt"}}  # what the config insists on
A100 = {
    "gpu": "a100-80gb",
    "gpus_per_node": 4,
    "tensor_parallel": 2,
    "cpus_per_gpu": 8,
    "mem_gb": 240,
    "modules": ["cuda/12.8"],
    "env": {"NCCL_DEBUG": "WARN"},
}

WORKER = """
    import json, sys, time
    import pyarrow as pa, pyarrow.parquet as pq
    from pathlib import Path
    run, name = Path(sys.argv[1]), sys.argv[sys.argv.index("--replica") + 1]
    def commit(unit, error=None):
        footer = dict(schema_version=2, unit=unit, generation=0, rows=2, samples=2, prompt_tokens=4, completion_tokens=6,
                      errors={error: 1} if error else {}, content_hash="", input_hash="", replica=name, versions={})
        columns = dict(finish_reason=["stop", "error" if error else "stop"], ttft_s=[0.1, 0.2], latency_s=[0.5, 1.0],
                       num_completion_tokens=[3, 3], shard=["a", "a"], row=[0, 1], sample=[0, 0], completion=["Hello", "World"],
                       error=pa.array([None, error], pa.string()), error_message=pa.array([None, error], pa.string()))
        table = pa.table(columns).replace_schema_metadata({"batchinfer": json.dumps(footer)})
        pq.write_table(table, run / "completions" / f"{unit:06d}.0.parquet")
"""


def command(folder: Path, body: str) -> tuple[str, ...]:
    path = folder / "fake_worker.py"
    path.write_text(textwrap.dedent(WORKER) + textwrap.dedent(body))
    return (sys.executable, str(path))


def make_config(**groups: Any) -> Config:
    cpu = {"gpu": None, "tensor_parallel": 1}
    return from_dict({"run_name": "test", **CHECKED, "hw": cpu, "launcher": {"kind": "local"}, **groups})


def make_run(root: Path, units: int = 1) -> RunDir:
    run_dir = RunDir(root / "run")
    ranges = [(RowRange(0, 2 * i, 2 * i + 2),) for i in range(units)]
    Manifest.create(run_dir, make_config(), InputSet(root, (Shard("a", 1, 2 * units, ""),), pa.schema([])), [], ranges, {})
    return run_dir


def eventually(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def launched(run_dir: RunDir, config: Config, worker: tuple[str, ...]) -> subprocess.Popen[str]:
    """`run_job` in a process group of its own, as a shell starts a foreground job."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom batchinfer.config import from_dict\n"
        "from batchinfer.job.launch import run_job\nfrom batchinfer.job.rundir import RunDir\n"
        f"sys.exit(run_job(RunDir(Path({str(run_dir.root)!r})), from_dict({config.to_dict()!r}), {worker!r}))"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_local_run_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path, units=2)
    config = make_config(launcher={"kind": "local", "nodes": 2})
    worker = command(tmp_path, "time.sleep(0.3); commit(int(name.split('-')[1]))")
    assert run_job(run_dir, config, worker, EXPECTED) == 0
    out = capfd.readouterr().out
    assert "4/4 rows (100%), 2/2 units; complete" in out and 'a:0: "Hello"' in out
    record = json.loads((run_dir.submissions / "01" / "submission.json").read_text())
    assert record["kind"] == "local" and len(record["jobs"]) == 2 and record["expected"] == EXPECTED
    assert json.loads((run_dir.report / "summary.json").read_text())["complete"]


def test_dead_replica_is_told_in_the_launching_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path)
    assert run_job(run_dir, make_config(), command(tmp_path, "time.sleep(0.5); sys.exit('the model is torn')")) == 1
    err = capfd.readouterr().err
    assert f"(the model is torn); not restarted; log: {run_dir.replica('01-0-0')}/log.txt" in err
    assert f"resume {run_dir.root}" in err


def test_a_failure_on_a_node_is_one_sentence_and_ends_the_other_jobs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The other one has hardly begun when the first finds out, and would sleep for long."""
    run_dir = make_run(tmp_path)
    body = """
        other = run / "replicas" / "01-1-0" / "died.json"
        if "-1-" in name:
            judged = dict(replica=name, exit_code=5, reason="", log="", undecided=True)  # or the first would wait for it
            other.write_text(json.dumps(judged))
            time.sleep(100)
        while not other.exists():
            time.sleep(0.1)
        print("batchinfer: the model is torn", flush=True)
        sys.exit(5)
    """
    config = make_config(launcher={"kind": "local", "nodes": 2})
    assert run_job(run_dir, config, command(tmp_path, body)) == 1
    out, err = capfd.readouterr()
    assert re.fullmatch(r"batchinfer: the model is torn \(found by replica 01-0-0 on .*\); .* resume .*\n", err), err
    assert out.count("\n") == 2, "where it was submitted, and how far it is"
    assert marked(mark_of_job(run_dir, 1)) == []


def test_inline_it_is_one_sentence_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path)
    worker = command(tmp_path, "print('batchinfer: the model is torn', flush=True); sys.exit(5)")
    assert run_job(run_dir, make_config(launcher={"kind": "inline"}), worker) == 1
    err = capfd.readouterr().err
    assert err.startswith("batchinfer: the model is torn (found by replica 01-0-0 on ") and err.count("\n") == 1, err


def test_what_no_job_could_write_the_launcher_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path)
    number, _ = run_dir.new_submission()
    assert launch._why(run_dir, number) is None
    monkeypatch.setattr(launch, "lasting_error", lambda folder: OSError(errno.EROFS, "Read-only file system"))
    found = launch._why(run_dir, number)
    assert found and found.reason == f"output.dir={run_dir.root} cannot be written any more: Read-only file system"


def test_too_many_error_rows_give_one(tmp_path: Path) -> None:
    run_dir, worker = make_run(tmp_path), command(tmp_path, "commit(0, error='null_prompt')")
    config = make_config(launcher={"kind": "inline"}, max_error_fraction=0.4)
    assert run_job(run_dir, config, worker) == 1
    assert run_job(run_dir, replace(config, max_error_fraction=0.5), worker) == 0


@pytest.mark.parametrize("kind", ["local", "inline"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_everything(tmp_path: Path, kind: str, signum: int) -> None:
    """As the terminal does: the signal goes to the whole foreground group."""
    run_dir = make_run(tmp_path)
    process = launched(run_dir, make_config(launcher={"kind": kind}), command(tmp_path, "time.sleep(100)"))
    eventually(lambda: (run_dir.replicas / "01-0-0").exists() and marked(mark_of_job(run_dir, 1)))
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert f"python -m batchinfer resume {run_dir.root}" in err
    assert marked(mark_of_job(run_dir, 1)) == []


def test_second_ctrl_c_kills(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    worker = command(tmp_path, "import signal; signal.signal(15, signal.SIG_IGN); (run / 'ready').touch(); time.sleep(100)")
    process = launched(run_dir, make_config(), worker)
    eventually((run_dir.root / "ready").exists)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 8, "less than the time of grace"
    assert marked(mark_of_job(run_dir, 1)) == []


def test_cancel_stops_jobs_that_nobody_waits_for(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    process = launched(run_dir, make_config(launcher={"kind": "local", "wait": False}), command(tmp_path, "time.sleep(100)"))
    process.communicate(timeout=30)
    assert process.returncode == 0
    eventually(lambda: marked(mark_of_job(run_dir, 1)))
    run_dir.cancel(1)
    assert cancel_jobs(run_dir) == 1
    eventually(lambda: not marked(mark_of_job(run_dir, 1)))
    eventually(lambda: cancel_jobs(run_dir) == 0)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with an sbatch that accepts everything, a squeue that knows nothing, and no GPU here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "sbatch", "echo Submitted batch job 123")
    write_program(folder / "squeue", "true")
    write_program(folder / "srun", "true")
    write_program(folder / "scontrol", "exit 1")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(hardware, "visible_gpus", lambda: [])
    return folder


def write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def slurm_config(**launcher: Any) -> Config:
    return make_config(hw=A100, launcher={"kind": "slurm", "wait": False, **launcher})


def test_golden_sbatch(tmp_path: Path, cluster: Path) -> None:
    run_dir = make_run(tmp_path)
    config = slurm_config(
        nodes=3,
        array_parallelism=2,
        partition="gpu",
        account="proj",
        reservation="maint",
        setup=["source env.sh"],
        extra={"comment": "batch", "exclusive": True},
    )
    assert run_job(run_dir, config) == 0
    text = (run_dir.submissions / "01" / "123_submission.sh").read_text()
    text = text.replace(str(run_dir.root), "RUN").replace(sys.executable, "PYTHON")
    assert text == GOLDEN.read_text()
    assert json.loads((run_dir.submissions / "01" / "submission.json").read_text())["jobs"] == ["123_0", "123_1", "123_2"]


def test_refusal_of_sbatch_is_one_sentence(tmp_path: Path, cluster: Path) -> None:
    write_program(cluster / "sbatch", "echo sbatch: error: invalid partition specified: nope >&2; exit 1")
    with pytest.raises(ConfigError, match="invalid partition specified: nope") as caught:
        run_job(make_run(tmp_path), slurm_config(partition="nope"))
    assert "\n" not in str(caught.value)


def test_slurm_is_cancelled_by_scancel(tmp_path: Path, cluster: Path) -> None:
    run_dir = make_run(tmp_path)
    run_job(run_dir, slurm_config())
    write_program(cluster / "scancel", f"echo $@ > {tmp_path}/cancelled")
    write_program(cluster / "squeue", "echo 123")
    assert cancel_jobs(run_dir) == 1
    assert (tmp_path / "cancelled").read_text() == "123\n"


def test_what_slurm_says_of_jobs_that_could_say_nothing() -> None:
    """As `scontrol show job --oneliner` prints them, with most fields left out."""
    form = "JobId={} ArrayJobId=7 ArrayTaskId={} JobName=a b JobState={} Reason={} ExitCode={} ReqNodeList=(null) NodeList={}"
    launch = ("FAILED", "JobLaunchFailure", "0:53")
    jobs = [
        (7, 2, *launch, "n3"),
        (8, 0, *launch, "n1"),
        (9, 1, "COMPLETED", "None", "0:0", "n2"),
        (10, 3, "NODE_FAIL", "None", "1:0", "n4"),
    ]
    assert slurm_failures("\n".join(form.format(*job) for job in jobs)) == [
        "jobs 7_0, 7_2 failed on n1, n3 without a word of their own; is the run directory there, and can it be written? "
        "SLURM says JobLaunchFailure, exit code 0:53",
        "jobs 7_3 failed on n4 without a word of their own; SLURM says NODE_FAIL, exit code 1:0",
    ]
    assert slurm_failures("JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode=6:0 NodeList=n1")[0].startswith(
        "jobs 7 failed"
    )
    assert slurm_failures("slurm_load_jobs error: Invalid job id specified") == []


def test_auto_kind(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto, gpus = {"kind": "auto"}, make_config(hw=A100, launcher={"kind": "auto"})
    assert resolve_kind(gpus) == "slurm"
    assert resolve_kind(make_config(launcher=auto)) == "local"
    with monkeypatch.context() as inside:
        inside.setenv("SLURM_JOB_ID", "1")
        assert resolve_kind(gpus) == "local"
    monkeypatch.setattr(hardware, "visible_gpus", lambda: [hardware.VisibleGPU("a100-80gb", 1, "GPU-x")] * 4)
    assert resolve_kind(gpus) == "local"
    monkeypatch.setattr(hardware, "visible_gpus", lambda: [])
    (cluster / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(cluster))  # where the tests run there may be a SLURM
    assert resolve_kind(gpus) == "local"


def test_outer_device_mask_travels_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-d,GPU-c,MIG-b,3,4")
    run_dir = make_run(tmp_path)
    (job,) = make_jobs(run_dir, 1, make_config(hw=A100), "local")
    assert job.devices() == [("GPU-d", "GPU-c"), ("MIG-b", "3")]
    (job,) = make_jobs(run_dir, 1, make_config(hw=A100), "slurm")
    assert job.visible_devices is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    assert job.devices() == [("7", "6"), ("5", "4")]


@pytest.mark.parametrize(
    ("kind", "nodes", "mask", "message"),
    [
        ("local", 2, None, "would share this host's GPUs"),
        ("inline", 2, None, "in this process"),
        ("local", 1, "0,1", "DEVICES=0,1"),
        ("local", 1, None, "must be at most 0, the GPUs that this host shows"),
        ("inline", 1, "0,1,2,3", "must be at most 0, the GPUs that this host shows"),
    ],
)
def test_what_cannot_be_placed(kind: str, nodes: int, mask: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_placeable(kind, make_config(hw=A100, launcher={"kind": kind, "nodes": nodes}))


def test_control_plane_does_not_import_torch() -> None:
    modules = "batchinfer.job.launch, batchinfer.display, batchinfer.report, batchinfer.stats"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_lost_connection_leaves_slurm_jobs_alone() -> None:
    assert signal.SIGHUP in stop_signals("local") and signal.SIGHUP in stop_signals("inline")
    assert set(stop_signals("slurm")) == {signal.SIGINT, signal.SIGTERM}
