"""A failure that only a node can find, on a real SLURM: one sentence in seconds, and nothing is left in the queue."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchinfer.tiny import make_sample
from tests.run.jobs import batchinfer
from tests.slurm.cluster import Cluster, eventually
from tests.slurm.request import PATIENCE_S, at_full_speed, ended_well, logs, on_slurm, replicas, submit

NODES = ("node1", "node2", "node3", "node4")
ONE_BY_ONE, AT_ONCE = "launcher.array_parallelism=1", "hw.cpus_per_gpu=9"  # of a node's 16: no two jobs on one


@pytest.fixture
def mounted_nowhere(cluster: Cluster, run_dir: Path) -> Iterator[list[str]]:
    """The overrides of a request for four jobs, whose checkpoint lies on a file system that no node has mounted."""
    model = run_dir.with_name("model")
    shutil.copytree(Path(make_sample.__file__).with_name("model"), model)
    with contextlib.ExitStack() as hidden:
        for name in NODES:
            hidden.enter_context(cluster.hidden(name, model))
        yield [f"model.path={model}", "launcher.nodes=4"]


def failure_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "submissions" / "01" / "failed.json").read_bytes())


def test_the_first_node_speaks_for_the_array(cluster: Cluster, run_dir: Path, mounted_nowhere: list[str]) -> None:
    done = batchinfer(*on_slurm(run_dir), *mounted_nowhere, ONE_BY_ONE)
    ended = time.time()
    assert done.returncode == 1, done.stdout + done.stderr
    failure = failure_of(run_dir)
    assert "/model has no config.json: it must be a checkpoint folder" in failure["reason"] and failure["node"] in NODES
    assert done.stderr.count("\n") == 1, done.stderr + logs(run_dir)
    assert f"{failure['reason']} (found by replica 01-0-0 on {failure['node']}; log: " in done.stderr
    assert f"python -m batchinfer resume {run_dir}" in done.stderr
    assert ended - failure["time"] < 30, "seconds, on a machine that does much else"
    assert run_dir.name not in cluster.jobs("%j") and replicas(run_dir) == ["01-0-0"]
    assert f"failed: {failure['reason']}" in batchinfer("status", run_dir).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most"), [(ONE_BY_ONE, 1), (AT_ONCE, 4)])
def test_nobody_waits_in_the_terminal(cluster: Cluster, run_dir: Path, mounted_nowhere: list[str], how: str, most: int) -> None:
    """The jobs themselves empty the queue. Where the checkpoint is the run goes on."""
    submit(run_dir, *mounted_nowhere, how)
    eventually(lambda: run_dir.name not in cluster.jobs("%j"), PATIENCE_S, lambda: logs(run_dir))
    found = replicas(run_dir)
    assert len(found) <= most and failure_of(run_dir)["replica"] in found, logs(run_dir)
    at_full_speed(run_dir)
    resumed = batchinfer("resume", run_dir, "launcher=inline")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr


@pytest.mark.slow
def test_a_node_without_the_checkpoint_is_left_out(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    """What would be the request's fault, if it did not work on another node."""
    model = run_dir.with_name("model")
    shutil.copytree(Path(make_sample.__file__).with_name("model"), model)
    with cluster.hidden("node8", model):
        submit(run_dir, f"model.path={model}", "launcher.partition=broken", "launcher.nodes=2", AT_ONCE)
        eventually(lambda: "back into the queue without node8" in logs(run_dir), PATIENCE_S, lambda: logs(run_dir))
        ended_well(cluster, run_dir, undisturbed)
    assert not (run_dir / "submissions" / "01" / "failed.json").exists()
