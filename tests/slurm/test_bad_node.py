"""A node of a real SLURM on which nothing works: the run goes on without it."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from tests.slurm.cluster import Cluster, eventually
from tests.slurm.request import PATIENCE_S, ended_well, logs, replicas, submit


def test_a_node_where_replicas_die_is_left_out(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    """Its Python environment is broken. The job that fell on it dies twice there, and then goes on elsewhere."""
    package = Path(tokenizers.__file__).parent
    with cluster.hidden("node8", package):
        submit(run_dir, "launcher.partition=broken", "launcher.nodes=2", "hw.cpus_per_gpu=9", "sampling.max_tokens=24")
        eventually(lambda: "back into the queue without node8" in logs(run_dir), PATIENCE_S, lambda: logs(run_dir))
        ended_well(cluster, run_dir, undisturbed)
    assert len([name for name in replicas(run_dir) if (run_dir / "replicas" / name / "died.json").exists()]) == 2
