"""What a real SLURM is asked for, what it refuses, and what its jobs find on their nodes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from batchinfer.job.launch import run_job
from tests.job.test_launch import command, make_config, make_run
from tests.run.jobs import batchinfer
from tests.slurm.cluster import MAX_ARRAY_SIZE, Cluster, eventually
from tests.slurm.request import PATIENCE_S, on_slurm


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launcher.partition=nope"], r"sbatch refused the job \(.*[Ii]nvalid partition.*\); check launcher.partition"),
        (["hw.mem_gb=100"], r"sbatch refused the job \(.*\); check launcher.partition, .*and what hw asks for"),
        (["launcher.extra={gres: 'gpu:5'}"], r"sbatch refused the job \(.*node configuration is not available"),
        ([f"launcher.nodes={MAX_ARRAY_SIZE + 1}"], f"launcher.nodes=34: must be at most {MAX_ARRAY_SIZE}, as this cluster's"),
        (["launcher.timeout_min=2881"], "launcher.timeout_min=2881: must be at most 2880, the limit of the default partition"),
        (["launcher.partition=short"], "launcher.timeout_min=1440: must be at most 30, the limit of partition short"),
    ],
)
def test_a_refusal_is_one_sentence(cluster: Cluster, run_dir: Path, overrides: list[str], said: str) -> None:
    done = batchinfer(*on_slurm(run_dir), *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, done.stderr) and done.stderr.count("\n") == 1, done.stderr
    assert run_dir.name not in cluster.jobs("%j")


def test_a_job_gets_what_the_tier_has(cluster: Cluster, run_dir: Path) -> None:
    """Two replicas on the four GPUs of a node, each with its own two; cores, memory and the lines of setup, one of
    which puts a command (a container's) before the job's."""
    run = make_run(run_dir)
    hw = {"gpu": "a100-80gb", "gpus_per_node": 4, "tensor_parallel": 2, "cpus_per_gpu": 2, "mem_gb": 20}
    container = 'srun() { command srun "${@:1:$#-5}" env FROM_CONTAINER=yes "${@: -5}"; }'  # as slurm/README.md has it
    setup = ["export FROM_SETUP=yes", container]
    config = make_config(run_name=run_dir.name, hw=hw, launcher={"kind": "slurm", "wait": False, "setup": setup})
    worker = command(run_dir, "import os; (run / name).write_text(json.dumps(dict(os.environ))); commit(0)")
    assert run_job(run, config, worker) == 0
    paths = [run.root / "01-0-0", run.root / "01-0-1"]
    eventually(lambda: all(path.exists() and path.stat().st_size for path in paths), PATIENCE_S)
    eventually(lambda: run_dir.name not in cluster.jobs("%j"), PATIENCE_S)
    first, second = (json.loads(path.read_text()) for path in paths)
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0,1", "2,3")
    assert first["OMP_NUM_THREADS"] == "2" and first["FROM_SETUP"] == first["FROM_CONTAINER"] == "yes"
    assert (first["SLURM_CPUS_PER_TASK"], first["SLURM_MEM_PER_NODE"]) == ("8", "20480")
