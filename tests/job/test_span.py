"""A job of two nodes, played by two processes of this host: they begin, die and end together. tests/slurm has real nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.job.node import NodeJob
from batchinfer.job.process import marked
from batchinfer.job.replica import mark_of_job, read_death
from batchinfer.job.rundir import RunDir
from batchinfer.job.span import Span, Word
from tests.job.test_launch_node import make_run, node_job, worker


def on_both_nodes(job: NodeJob) -> list[subprocess.Popen[str]]:
    program = f"import sys; from batchinfer.job.node import NodeJob; sys.exit({job!r}())"
    environments = [{**os.environ, "SLURM_NODEID": str(node)} for node in range(2)]
    return [subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True) for env in environments]


def spanning(run_dir: RunDir, body: str) -> NodeJob:
    job = node_job(run_dir, worker(run_dir.root, "node = int(os.environ['SLURM_NODEID'])\n" + body))
    return replace(job, nodes=2, tensor_parallel=2)


def test_a_part_that_dies_takes_the_other_with_it_and_both_begin_anew(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, units=2)
    body = """
if name == "01-0-0" and node == 1:
    while not os.listdir(run / "completions"):
        time.sleep(0.05)
    sys.exit("the cable is out")
if node == 0:
    commit(0 if name == "01-0-0" else 1)
if name == "01-0-0" or node == 1:
    time.sleep(100)
"""
    leader, follower = on_both_nodes(spanning(run_dir, body))
    assert (leader.wait(timeout=60), follower.wait(timeout=60)) == (0, 0)
    death = read_death(run_dir, "01-0-0")
    assert death and death.reason.endswith(": the cable is out") and death.restarted_as == "01-0-0.1"
    assert sorted(os.listdir(run_dir.replicas)) == ["01-0-0", "01-0-0.1"]
    assert "the cable is out" in (run_dir.replica("01-0-0") / "log-node1.txt").read_text()
    assert marked(mark_of_job(run_dir, 1)) == []


def test_what_every_node_has_to_say_is_told(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    body = """
(run / f"begun{node}").touch()
while not (run / f"begun{1 - node}").exists():
    time.sleep(0.02)
sys.exit(f"node {node} has no GPU")
"""
    leader, follower = on_both_nodes(spanning(run_dir, body))
    assert (leader.wait(timeout=60), follower.wait(timeout=60)) == (1, 0)
    assert leader.stderr is not None
    said = leader.stderr.read()
    assert "node 0 has no GPU; " in said and "node 1 has no GPU); not restarted" in said


def test_a_requeued_job_does_not_listen_to_its_former_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Span.here(2, tmp_path, 0).say(Word("01-0-0", "node1", 1234))
    assert Span.here(2, tmp_path, 0).hear().replica == "01-0-0"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Span.here(2, tmp_path, 0).hear() == Word()
