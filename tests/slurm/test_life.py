"""The life of a job on a real SLURM: whatever happens to it, every row comes out once, with the text of an undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.run.jobs import batchinfer, start
from tests.slurm.cluster import Cluster, eventually
from tests.slurm.request import (
    PATIENCE_S,
    at_full_speed,
    committed,
    ended_well,
    hosts,
    in_the_middle,
    logs,
    on_slurm,
    replicas,
    submit,
)


def test_an_array_over_four_nodes(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    """The launching terminal stays, and the run can be looked at from another one."""
    log, whole_nodes = run_dir.with_name("log"), "hw.cpus_per_gpu=9"  # of 16: no two jobs on one
    job = start(*on_slurm(run_dir), "launcher.nodes=4", whole_nodes, log=log)
    eventually(lambda: len(hosts(run_dir)) == 4 and committed(run_dir), PATIENCE_S, lambda: logs(run_dir))
    assert "4 replicas (" in batchinfer("status", run_dir).stdout
    ended_well(cluster, run_dir, undisturbed)
    assert job.wait(timeout=PATIENCE_S) == 0, log.read_text()
    assert hosts(run_dir) <= {"node1", "node2", "node3", "node4"}
    assert "units; complete" in log.read_text()


def test_a_job_put_back_into_the_queue(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    job = submit(run_dir)
    in_the_middle(run_dir)
    cluster.ask("scontrol", "requeue", job)
    ended_well(cluster, run_dir, undisturbed)
    assert replicas(run_dir) == ["01-0-0", "01-0-0.1"]


def test_a_job_that_makes_way_for_another(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    submit(run_dir, "launcher.partition=preempt")
    in_the_middle(run_dir)
    cluster.ask("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    ended_well(cluster, run_dir, undisturbed)
    assert replicas(run_dir) == ["01-0-0", "01-0-0.1"]
    assert "this job is preempted" in logs(run_dir)


def test_a_job_at_its_time_limit(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    """SLURM looks every half minute, and warns up to a minute early: at once, or half a minute later."""
    submit(run_dir, "launcher.timeout_min=1", "launcher.signal_delay_s=30", "launcher.partition=short")
    in_the_middle(run_dir)
    eventually(lambda: "this job is timed-out" in logs(run_dir), 60)
    ended_well(cluster, run_dir, undisturbed)
    assert replicas(run_dir)[:2] == ["01-0-0", "01-0-0.1"]  # a busy machine may need another minute


def test_a_node_goes_down(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    """Another one takes its units over, and SLURM starts its job elsewhere."""
    submit(run_dir, "launcher.partition=fragile", "launcher.nodes=2", "hw.cpus_per_gpu=9")
    eventually(lambda: len(hosts(run_dir)) == 2 and committed(run_dir), PATIENCE_S, lambda: logs(run_dir))
    in_the_middle(run_dir)
    lost = min(hosts(run_dir))
    cluster.kill_node(lost)
    try:
        ended_well(cluster, run_dir, undisturbed)
    finally:
        cluster.revive_node(lost)


def test_scancel_ends_the_run_and_resume_goes_on(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    log = run_dir.with_name("log")
    job = start(*on_slurm(run_dir), log=log)
    in_the_middle(run_dir)
    cluster.ask("scancel", f"--name={run_dir.name}")
    assert job.wait(timeout=60) == 1
    assert f"rows are missing; finish it with: python -m batchinfer resume {run_dir}" in log.read_text()
    at_full_speed(run_dir)
    assert batchinfer("resume", run_dir).returncode == 0
    ended_well(cluster, run_dir, undisturbed)


def test_cancelled_from_another_shell_means_cancelled(cluster: Cluster, run_dir: Path, undisturbed: dict) -> None:
    submit(run_dir, "launcher.nodes=2")
    in_the_middle(run_dir)
    assert batchinfer("cancel", run_dir).returncode == 0
    eventually(lambda: run_dir.name not in cluster.jobs("%j"), 30, lambda: cluster.jobs("%i %T %r"))
    at_full_speed(run_dir)
    assert batchinfer("resume", run_dir, "launcher=inline").returncode == 0
    ended_well(cluster, run_dir, undisturbed)


def test_ctrl_c_in_the_launching_terminal_cancels_the_jobs(cluster: Cluster, run_dir: Path) -> None:
    log = run_dir.with_name("log")
    job = start(*on_slurm(run_dir), log=log)
    eventually(lambda: "submission 01" in log.read_text(), PATIENCE_S)
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=60) == 130, log.read_text()
    assert run_dir.name not in cluster.jobs("%j")
