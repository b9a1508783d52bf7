"""Stopped in the middle of rows, again and again: the same text as undisturbed, and no token is generated twice. In float64."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import submitit

from batchinfer.job.manifest import Manifest
from batchinfer.job.node import NodeJob
from batchinfer.job.requeues import count_requeues
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from tests.run.deaths import eventually
from tests.run.jobs import batchinfer, completions, environment, kill, processes_of, start, texts

SCHEMA = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 30, "maxItems": 40})
ASKED = [
    {},
    {"n": 3, "temperature": 1.2, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 20, "ignore_eos": False},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 3},
    {"stop": ["the value of", "self.", "return"], "min_tokens": 10},
    {"json_schema": SCHEMA},
    {"prompt_logprobs": 2, "n": 2},
    {"max_tokens": 9},
]
ROWS = 3 * len(ASKED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    prompts = [["Return the ", "def f(x):\n", "The list of "][k // len(ASKED)] for k in range(ROWS)]
    how = [json.dumps(ASKED[k % len(ASKED)]) for k in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts, "how": how}), folder / "in.parquet")
    return folder


def request(folder: Path, *overrides: str) -> list[str]:
    return [
        "hw=cpu",
        "hw.cpus_per_gpu=1",
        "input=parquet",
        f"input.paths=['{folder / 'in.parquet'}']",
        "input.prompt_column=prompt",
        "input.sampling_column=how",
        "input.rows_per_unit=5",
        "model.dtype=float64",
        "seed=3",
        "sampling.temperature=0.8",
        "sampling.max_tokens=120",
        "sampling.ignore_eos=true",
        "sampling.logprobs=0",
        "sampling.prompt_logprobs=0",
        "output.token_ids=true",
        "engine.max_num_seqs=8",
        *overrides,
    ]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    run_dir = folder / "whole"
    done = batchinfer(*request(folder), "launcher=inline", f"output.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def tokens_so_far(run_dir: Path) -> int:
    return sum(json.loads(path.read_bytes()).get("completion_tokens", 0) for path in run_dir.glob("replicas/*/progress.json"))


def job_pid(run_dir: Path) -> int:
    return int(json.loads((run_dir / "submissions" / "01" / "job-00.json").read_bytes())["pid"])


def stop_after(run_dir: Path, tokens: int, signum: int) -> int:
    """The signal to the job when so many more tokens are there; waits until it has ended. Returns how many there are."""
    wanted = tokens_so_far(run_dir) + tokens
    eventually(lambda: tokens_so_far(run_dir) >= wanted, 120)
    pid = job_pid(run_dir)
    os.kill(pid, signum)
    eventually(lambda: not any(found == pid for found in processes_of(run_dir.parent)), 60)
    return tokens_so_far(run_dir)


def stats_sum(run_dir: Path, column: str) -> int:
    return sum(sum(pq.read_table(path)[column].to_pylist()) for path in (run_dir / "stats").glob("*.parquet"))


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert verify(RunDir(run_dir)) == []
    assert texts(run_dir) == texts(undisturbed)
    found, expected = completions(run_dir), completions(undisturbed)
    for name in ("logprobs", "prompt_logprobs"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    assert all(row["ttft_s"] <= row["latency_s"] for row in found.select(["ttft_s", "latency_s"]).to_pylist())
    assert not os.listdir(run_dir / "partials"), "they go with their units"


def assert_nothing_twice(run_dir: Path) -> None:
    rows = completions(run_dir)
    assert stats_sum(run_dir, "decode_tokens") == sum(rows["num_completion_tokens"].to_pylist())


def assert_replicas_tell_their_own_steps(run_dir: Path) -> None:
    steps: dict[str, int] = {}
    for path in (run_dir / "stats").glob("*.parquet"):
        for row in pq.read_table(path, columns=["replica", "step"]).to_pylist():
            steps[row["replica"]] = max(row["step"], steps.get(row["replica"], 0))
    for row in completions(run_dir).to_pylist():
        assert 0 <= row["step_first"] <= row["step_last"] <= steps[row["replica"]]


def test_stopped_in_mid_row_again_and_again(folder: Path, undisturbed: Path) -> None:
    """Twice by the warning, after which the job puts itself back, then by SIGTERM, after which it is resumed by hand."""
    run_dir, log = folder / "run", folder / "log"
    job = start(*request(folder), "launcher=local", "launcher.timeout_min=60", f"output.dir={run_dir}", log=log)
    for signum in (signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM):
        stop_after(run_dir, 500, signum)
        assert list((run_dir / "partials").iterdir()), "something was in work"
    assert job.wait(60) == 1, log.read_text()
    assert count_requeues(run_dir / "submissions" / "01") == 2
    done = batchinfer("resume", run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(run_dir, undisturbed)
    assert_nothing_twice(run_dir)
    assert_replicas_tell_their_own_steps(run_dir)


@pytest.mark.slow
def test_a_damaged_partial_costs_its_tokens_only(folder: Path, undisturbed: Path) -> None:
    run_dir, log = folder / "damaged", folder / "damaged.log"
    job = start(*request(folder), "launcher=local", "launcher.timeout_min=60", f"output.dir={run_dir}", log=log)
    stop_after(run_dir, 500, signal.SIGTERM)
    assert job.wait(60) == 1, log.read_text()
    for path in (run_dir / "partials").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    done = batchinfer("resume", run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left aside" in (run_dir / "replicas" / "02-0-0" / "log.txt").read_text()
    assert_same(run_dir, undisturbed)
    assert stats_sum(run_dir, "decode_tokens") > sum(completions(run_dir)["num_completion_tokens"].to_pylist())


@pytest.mark.slow
def test_killed_after_a_stop_it_goes_on_from_the_stop(folder: Path, undisturbed: Path) -> None:
    run_dir, log = folder / "killed", folder / "killed.log"
    job = start(*request(folder), "launcher=local", "launcher.timeout_min=60", f"output.dir={run_dir}", log=log)
    saved = stop_after(run_dir, 500, signal.SIGUSR2)
    eventually(lambda: tokens_so_far(run_dir) >= saved + 300, 120)
    kill(sorted({job.pid, *processes_of(run_dir)}))
    job.wait()
    done = batchinfer("resume", run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(run_dir, undisturbed)


@pytest.mark.slow
def test_two_ranks_save_and_go_on_too(folder: Path, undisturbed: Path) -> None:
    run_dir, log = folder / "ranks", folder / "ranks.log"
    two = ["hw.gpus_per_node=2", "hw.tensor_parallel=2", "launcher=local", "launcher.timeout_min=60"]
    job = start(*request(folder), *two, f"output.dir={run_dir}", log=log)
    stop_after(run_dir, 500, signal.SIGUSR2)
    assert job.wait(240) == 0, log.read_text()
    assert_same(run_dir, undisturbed)
    assert_nothing_twice(run_dir)


@pytest.mark.slow
def test_time_limits_cost_no_token(folder: Path, undisturbed: Path) -> None:
    """Replicas stop by themselves before the limit, the job puts itself back, and they go on where they stopped.

    Under submitit's local executor, with a limit that leaves each start about a third of the work.
    """
    run_dir, log = folder / "limited", folder / "limited.log"
    job = start(*request(folder), "launcher=local", "launcher.timeout_min=60", f"output.dir={run_dir}", log=log)
    stop_after(run_dir, 100, signal.SIGTERM)
    assert job.wait(60) == 1, log.read_text()
    number, submission = RunDir(run_dir).new_submission()
    shutil.copy(run_dir / "submissions" / "01" / "submission.json", submission)
    summary = json.loads((undisturbed / "report" / "summary.json").read_bytes())
    limit = summary["replicas"]["01-0-0"]["phases_s"]["first_token"] + summary["wall_s"] / 3 + 4
    executor = submitit.LocalExecutor(folder=submission, max_num_timeout=10)
    executor.update_parameters(timeout_min=limit / 60, signal_delay_s=8, stderr_to_stdout=True)
    limits = {"time_limit_s": limit, "warning_s": 8.0, "env": environment()}
    executor.submit(NodeJob(str(run_dir), number, 0, 1, 1, (), cpus_per_rank=1, **limits)).wait()
    assert count_requeues(submission) >= 1
    logs = "".join(path.read_text() for path in run_dir.glob("replicas/02-*/log.txt"))
    assert "the time of the job is up" in logs or "no further row is begun" in logs
    if len(RunDir(run_dir).done_units()) < len(
        Manifest.load(RunDir(run_dir)).units
    ):  # the executor starts a job six times at most
        done = batchinfer("resume", run_dir)
        assert done.returncode == 0, done.stderr
    assert_same(run_dir, undisturbed)
    assert_nothing_twice(run_dir)
