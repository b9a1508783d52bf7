"""Nodes that a run keeps away from: on which its replicas die before they have committed anything, while others work elsewhere.

All that is needed stands in the run directory (`died.json`, `progress.json`), so every job of a submission sees the same. A job
that failed on such a node, or starts on one, goes back into the queue with the node excluded; a later submission excludes it
from the start. Where nothing works on any other node, the request is at fault and not the node, and the job has failed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

from batchinfer.job.replica import Death, read_death, read_progress
from batchinfer.job.rundir import RunDir

DEATHS = 2  # before a first commit, of replicas on one node in one submission
AT_WORK = ("loading", "running", "waiting", "done")

# In one shell that no signal ends: SLURM sends SIGTERM to all processes of a job that it puts back. Until it runs again it is
# pending, and may be given other nodes; the list is set whole.
REQUEUE = """
trap '' TERM USR2
scontrol requeue "$1" || exit
[ -z "$2" ] || scontrol update JobId="$1" ExcNodeList="$2"
"""


def left_out(run_dir: RunDir, submission: int) -> list[str]:
    """Nodes of this submission, by SLURM's names."""
    deaths = Counter(death.node for death in _early_deaths(run_dir, submission))
    return sorted(node for node, count in deaths.items() if count >= DEATHS and _works_elsewhere(run_dir, submission, node))


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def has_failed_here(run_dir: RunDir, submission: int) -> bool:
    """Whether replicas died early on this node, though others work elsewhere: then another node, or another try, may do."""
    here = node_name()
    died = any(death.node == here for death in _early_deaths(run_dir, submission))
    return died and _works_elsewhere(run_dir, submission, here)


def requeue_elsewhere(run_dir: RunDir, submission: int) -> bool:
    """Put this job back into SLURM's queue, away from the nodes that are left out. False: SLURM would not."""
    job, nodes = _job_id(), left_out(run_dir, submission)
    asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%x"], capture_output=True, text=True).stdout.strip()
    exclude = ",".join(dict.fromkeys([*filter(None, asked.split(",")), *nodes])) if nodes else ""
    where = f"without {', '.join(nodes)}" if nodes else "for another try"
    print(f"replicas died on {node_name()} that work elsewhere; back into the queue {where}", file=sys.stderr, flush=True)
    return subprocess.run(["sh", "-c", REQUEUE, "requeue", job, exclude]).returncode == 0


def cancel_others(running_too: bool) -> None:
    """Take the other jobs of this one's array out of SLURM's queue; `running_too`: those at work end as well."""
    array = _array()
    if array is None:
        return
    with contextlib.suppress(FileNotFoundError):  # inside a container: they see for themselves when they start
        subprocess.run(["scancel", "--state=PENDING", array], check=False)
        others = [f"{array}_{job}" for job in running_jobs() if f"{array}_{job}" != _job_id()]
        if running_too and others:
            subprocess.run(["scancel", *others], check=False)


def running_jobs() -> list[int]:
    """The jobs of this one's array that SLURM has on a node, this one among them; none where it is not known."""
    array = _array()
    if array is None:
        return []
    asked = ["squeue", "-h", "-r", "-j", array, "-t", "RUNNING", "-o", "%K"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return [int(word) for word in done.stdout.split() if word.isdecimal()]


def _array() -> str | None:
    """None where this job is not an element of ours: somebody's own array may be around an `inline` one."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else None


def _job_id() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _early_deaths(run_dir: RunDir, submission: int) -> Iterator[Death]:
    for name in _replicas(run_dir, submission):
        death = read_death(run_dir, name)
        if death is not None and death.early:
            yield death


def _works_elsewhere(run_dir: RunDir, submission: int, node: str) -> bool:
    for name in _replicas(run_dir, submission):
        said = read_progress(run_dir, name)
        if said.get("phase") in AT_WORK and _short(said["process"]["host"]) != _short(node) and not read_death(run_dir, name):
            return True
    return False


def _short(host: str) -> str:
    return host.split(".")[0]


def _replicas(run_dir: RunDir, submission: int) -> list[str]:
    return [name for name in os.listdir(run_dir.replicas) if name.startswith(f"{submission:02d}-")]
