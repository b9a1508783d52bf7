"""Killed at any moment = never killed: the same rows, once each, with the same text, at temperature 0.8 in float64."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.run.jobs import batchinfer, kill, processes_of, start, texts, wait_until_gone

REQUEST = [
    "model.dtype=float64",
    "sampling.temperature=0.8",
    "sampling.max_tokens=24",
    "input.limit=120",
    "input.rows_per_unit=8",
    "output.token_ids=true",
    "engine.max_num_seqs=16",
    "engine.max_num_batched_tokens=128",
    "hw=cpu",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, float]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    result = batchinfer(*REQUEST, "launcher=inline", f"output.dir={run_dir}")
    assert result.returncode == 0, result.stdout + result.stderr
    expected = texts(run_dir)
    assert len(expected) == 120
    return expected, time.monotonic() - started


def kill_campaign(run_dir: Path, seed: int, kills: int, duration: float) -> None:
    """Starts the job again and again, each time killing all of it or any one of its processes at a random moment.

    What survives the death of one process goes on, and shares the run with the next start.
    """
    rng = random.Random(seed)
    for number in range(kills):
        launcher = rng.choice(["inline", "local"])
        log = run_dir.with_name(f"{run_dir.name}-{number}.log")
        job = start(*REQUEST, f"launcher={launcher}", f"output.dir={run_dir}", log=log)
        time.sleep(rng.uniform(0.2, 1.1) * duration)
        pids = sorted({job.pid, *processes_of(run_dir)})
        kill(pids if rng.random() < 0.6 else [rng.choice(pids)])
        job.poll()


def survive(run_dir: Path, seed: int, kills: int, undisturbed: tuple[dict, float]) -> None:
    expected, duration = undisturbed
    kill_campaign(run_dir, seed, kills, duration)
    if (run_dir / "manifest.json").exists():
        result = batchinfer("resume", run_dir)
    else:  # killed before it existed: it starts over
        result = batchinfer(*REQUEST, f"output.dir={run_dir}")
    assert result.returncode == 0, result.stdout + result.stderr
    verified = batchinfer("verify", run_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert texts(run_dir) == expected
    assert not wait_until_gone(run_dir, 30), "a process outlived its run"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_kill_campaign(undisturbed: tuple[dict, float], tmp_path: Path, seed: int) -> None:
    survive(tmp_path / "run", seed, 8, undisturbed)


@pytest.mark.slow  # of what a campaign does, too
def test_two_invocations_share_one_run(undisturbed: tuple[dict, float], tmp_path: Path) -> None:
    expected, _ = undisturbed
    run_dir = tmp_path / "run"
    jobs = [start(*REQUEST, "launcher=inline", f"output.dir={run_dir}", log=tmp_path / f"{k}.log") for k in range(2)]
    assert [job.wait(timeout=240) for job in jobs] == [0, 0], "".join((tmp_path / f"{k}.log").read_text() for k in range(2))
    assert texts(run_dir) == expected
    assert batchinfer("verify", run_dir).returncode == 0


def test_three_replicas_say_what_one_says(undisturbed: tuple[dict, float], tmp_path: Path) -> None:
    expected, _ = undisturbed
    run_dir = tmp_path / "run"
    result = batchinfer(*REQUEST, "hw.gpus_per_node=3", "hw.tensor_parallel=1", f"output.dir={run_dir}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert texts(run_dir) == expected


def test_tensor_parallel_two_says_what_one_says(undisturbed: tuple[dict, float], tmp_path: Path) -> None:
    expected, _ = undisturbed
    run_dir = tmp_path / "run"
    result = batchinfer(*REQUEST, "hw.gpus_per_node=2", "hw.tensor_parallel=2", f"output.dir={run_dir}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert texts(run_dir) == expected
