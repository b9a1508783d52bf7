"""Which nodes are left out, from what replicas leave behind. tests/slurm does it with a node on which nothing works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.job import left_out as left_out_module
from batchinfer.job.left_out import cancel_others, left_out, running_jobs
from batchinfer.job.replica import Death, write_death
from batchinfer.job.rundir import RunDir


def died(run_dir: RunDir, name: str, node: str, early: bool = True) -> None:
    run_dir.replica(name).mkdir()
    write_death(run_dir, Death(name, 1, "no such device", "log.txt", node=node, early=early))


def works(run_dir: RunDir, name: str, host: str, phase: str = "running") -> None:
    run_dir.replica(name).mkdir()
    run_dir.progress(name).write_text(json.dumps({"phase": phase, "process": {"host": host}}))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.replicas.mkdir()
    return run_dir


def test_deaths_where_others_work(run_dir: RunDir) -> None:
    died(run_dir, "01-0-0", "n1")
    works(run_dir, "01-1-0", "n2.cluster.local")
    assert left_out(run_dir, 1) == []
    died(run_dir, "01-0-0.1", "n1")
    assert left_out(run_dir, 1) == ["n1"]
    assert left_out(run_dir, 2) == []


@pytest.mark.parametrize(("host", "phase"), [("n1.cluster.local", "running"), ("n2", "failed"), ("n2", "starting")])
def test_nothing_that_works_elsewhere(run_dir: RunDir, host: str, phase: str) -> None:
    died(run_dir, "01-0-0", "n1")
    died(run_dir, "01-0-1", "n1")
    works(run_dir, "01-1-0", host, phase)
    assert left_out(run_dir, 1) == []


def test_a_replica_that_died_does_not_work(run_dir: RunDir) -> None:
    """Though its last word was that it is running."""
    for node in ("n1", "n2"):
        died(run_dir, f"01-{node}-0", node)
        died(run_dir, f"01-{node}-1", node)
        run_dir.progress(f"01-{node}-0").write_text(json.dumps({"phase": "running", "process": {"host": node}}))
    assert left_out(run_dir, 1) == []


def test_somebodys_own_array_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`launcher=inline` in an array that the user has submitted: its other jobs are none of ours."""
    asked: list[str] = []
    monkeypatch.setattr(left_out_module.subprocess, "run", lambda command, **_: asked.append(command[0]))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    cancel_others(running_too=True)
    assert running_jobs() == [] and asked == []


def test_deaths_after_a_commit_and_of_several_nodes_say_nothing_of_a_node(run_dir: RunDir) -> None:
    works(run_dir, "01-9-0", "n9")
    for k in range(3):
        died(run_dir, f"01-0-{k}", "n1", early=False)
    assert left_out(run_dir, 1) == []
