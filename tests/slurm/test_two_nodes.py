"""One model over two nodes of a real SLURM: the ranks meet, share their batches by gloo, and live and die together."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.cluster import Cluster, eventually
from tests.slurm.request import PATIENCE_S, committed, ended_well, in_the_middle, logs, replicas, submit

SPAN = ["hw.nodes_per_replica=2", "launcher.nodes=2", "launcher.partition=fragile", "input.limit=24", "input.rows_per_unit=2"]


def test_a_rank_on_each_of_two_nodes(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    """A rank is killed on the other node, and the job is put back into the queue later: each time both parts begin anew."""
    job = submit(run_dir, *SPAN)
    in_the_middle(run_dir)
    said = (run_dir / "replicas/01-0-0/log.txt").read_text()
    assert "batches are shared by gloo, not through shared memory: rank 1: " in said
    cluster.kill_worker(run_dir, rank=1)
    death = run_dir / "replicas/01-0-0/died.json"
    eventually(death.exists, PATIENCE_S, lambda: logs(run_dir))
    assert "killed by SIGKILL" in death.read_text() and '"restarted_as": "01-0-0.1"' in death.read_text()
    in_the_middle(run_dir, committed(run_dir) + 1)
    cluster.ask("scontrol", "requeue", job)
    ended_well(cluster, run_dir, undisturbed, 24)
    assert replicas(run_dir) == ["01-0-0", "01-0-0.1", "01-0-0.2"]
    eventually(lambda: run_dir.name not in cluster.jobs("%j"), PATIENCE_S, lambda: cluster.jobs("%i %T %r"))
