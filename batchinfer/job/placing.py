"""How submitit places jobs on this host or under SLURM, and how placed jobs are asked and stopped.

submitit starts and requeues; whether a job still lives is asked of its processes, or of squeue, which unlike sacct needs no
accounting.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchinfer.config import Config, ConfigError
from batchinfer.job.left_out import left_out
from batchinfer.job.node import NodeJob, identity_of_job
from batchinfer.job.process import boot_id, is_alive, kill_marked, send
from batchinfer.job.replica import FULL, mark_of_job
from batchinfer.job.rundir import RunDir

SQUEUE_EVERY_S = 10.0
HARD_ENDS = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")


class Placed(Protocol):
    """Jobs that were started and can be asked and stopped."""

    @property
    def ids(self) -> list[str]: ...
    def alive(self) -> bool: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def failures(self) -> list[str]: ...


@dataclass
class LocalJobs:
    """submitit's local jobs: a controller process each, whose child is the NodeJob."""

    folder: Path
    jobs: Sequence[Any]
    mark: str

    @property
    def ids(self) -> list[str]:
        return [str(job.job_id) for job in self.jobs]

    def alive(self) -> bool:
        return any(not job.done() for job in self.jobs)

    def stop(self) -> None:
        """SIGTERM to the controllers, which hand it on. (`job.cancel` sends SIGINT, and SIGKILL a second later.)"""
        for job in self.jobs:
            if not job.done():
                send(int(job.job_id), signal.SIGTERM)

    def kill(self) -> None:
        for job, path in zip(self.jobs, identities(self.folder, len(self.jobs)), strict=True):
            if not job.done():
                send(int(job.job_id), signal.SIGKILL)
            signal_job(path, signal.SIGKILL)
        kill_marked(self.mark)

    def failures(self) -> list[str]:
        """One sentence for each ended job that came to no result of its own; their replicas tell of themselves."""
        return [sentence for job in self.jobs if job.done() and (sentence := _failure(job))]


def _failure(job: Any) -> str | None:
    log, result = job.paths.stdout, job.paths.result_pickle
    if not result.exists():
        return f"job {job.job_id} was killed before its end; log: {log}"
    outcome, value = pickle.loads(result.read_bytes())
    return None if outcome == "success" else f"job {job.job_id} failed ({str(value).strip().splitlines()[-1]}); log: {log}"


@dataclass
class SlurmJobs:
    """A submitted array, or a single job."""

    ids: list[str]
    next_look: float = 0.0
    was_alive: bool = True
    array: str = field(init=False)

    def __post_init__(self) -> None:
        self.array = self.ids[0].split("_")[0]

    def alive(self) -> bool:
        """Whether squeue lists any of them (pending and requeued ones too), asked every ten seconds."""
        if self.was_alive and time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + SQUEUE_EVERY_S
            answer = subprocess.run(["squeue", "-h", "-j", self.array, "-o", "%i"], capture_output=True, text=True)
            gone = answer.returncode == 0 and not answer.stdout.strip()
            self.was_alive = not (gone or "Invalid job id" in answer.stderr)  # any other failure says nothing about the job
        return self.was_alive

    def stop(self) -> None:
        subprocess.run(["scancel", self.array], check=False)
        self.next_look = 0.0

    def kill(self) -> None:
        self.stop()

    def failures(self) -> list[str]:
        """What SLURM says of those that it saw fail: they could not say it themselves."""
        done = subprocess.run(["scontrol", "show", "job", "--oneliner", self.array], capture_output=True, text=True)
        return slurm_failures(done.stdout)


def slurm_failures(shown: str) -> list[str]:
    """Of lines of `scontrol show job --oneliner`, which knows ended jobs for some minutes: a sentence for each way in which jobs
    failed. For SLURM a job that says itself how it fails has ended well."""
    ends: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for line in shown.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("JobState") in HARD_ENDS:
            number = fields.get("ArrayTaskId")
            name = f"{fields['ArrayJobId']}_{number}" if number else fields["JobId"]
            state = fields["JobState"] if fields["Reason"] == "None" else fields["Reason"]
            ends[state, fields["ExitCode"]].append((name, fields["NodeList"]))
    return [_slurm_failure(state, code, jobs) for (state, code), jobs in ends.items()]


def _slurm_failure(state: str, code: str, jobs: Sequence[tuple[str, str]]) -> str:
    names, nodes = (", ".join(sorted(set(words))) for words in zip(*jobs, strict=True))
    hint = "is the run directory there, and can it be written? " if state == "JobLaunchFailure" or code == f"{FULL}:0" else ""
    return f"jobs {names} failed on {nodes} without a word of their own; {hint}SLURM says {state}, exit code {code}"


def place_local(config: Config, folder: Path, jobs: Sequence[NodeJob]) -> LocalJobs:
    import submitit

    launcher = config.launcher
    executor = submitit.LocalExecutor(folder=folder, max_num_timeout=launcher.max_requeues)
    executor.update_parameters(timeout_min=launcher.timeout_min, signal_delay_s=signal_delay(config), stderr_to_stdout=True)
    # A Ctrl-C reaches the whole foreground group. The controllers must not see it: they would kill their job after one
    # second. Nor may the end of the terminal reach jobs that nobody waits for.
    shielded = [signal.SIGINT, *([] if launcher.wait else [signal.SIGHUP])]
    with _ignored(shielded), _output_to(folder / "controllers.log"):
        placed = [executor.submit(job) for job in jobs]
    return LocalJobs(folder, placed, mark_of_job(RunDir(Path(jobs[0].run_dir)), jobs[0].submission))


def place_slurm(run_dir: RunDir, config: Config, folder: Path, jobs: Sequence[NodeJob]) -> SlurmJobs:
    import submitit

    executor = submitit.SlurmExecutor(folder=folder.absolute(), max_num_timeout=config.launcher.max_requeues)
    try:
        executor.update_parameters(**sbatch_parameters(run_dir, config))
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises, too
            placed = executor.submit_array(list(jobs))
    except submitit.core.utils.FailedJobError as error:
        lines = [line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"launcher.kind=slurm: sbatch refused the job ({'; '.join(lines)}); check launcher.partition, account, "
            "qos, constraint, timeout_min and extra, and what hw asks for"
        ) from error
    return SlurmJobs([str(job.job_id) for job in placed])


def sbatch_parameters(run_dir: RunDir, config: Config) -> dict[str, Any]:
    """What submitit's SlurmExecutor is told; one task on each node of an element of the array, which mostly is one."""
    hw, launcher = config.hw, config.launcher
    cpus = None if hw.cpus_per_gpu is None else hw.cpus_per_gpu * hw.gpus_per_node
    wanted = {
        "job_name": config.run_name or run_dir.root.name,
        "time": launcher.timeout_min,
        "nodes": hw.nodes_per_replica,
        "ntasks_per_node": 1,
        "gpus_per_node": None if hw.gpu is None else hw.gpus_per_node,
        "cpus_per_task": cpus,
        "srun_args": _srun_args(cpus, hw.nodes_per_replica) or None,
        "mem": None if hw.mem_gb is None else f"{hw.mem_gb}GB",
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "setup": [*(f"module load {name}" for name in hw.modules), *launcher.setup] or None,
        "exclude": None if "exclude" in launcher.extra else ",".join(_excluded(run_dir)) or None,
        "array_parallelism": launcher.array_parallelism or launcher.nodes,
        "signal_delay_s": signal_delay(config),
        "stderr_to_stdout": True,
        "additional_parameters": _additional(config),
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _excluded(run_dir: RunDir) -> list[str]:
    """Nodes that an earlier submission left out."""
    numbers = [int(name) for name in os.listdir(run_dir.submissions) if name.isdecimal()]
    return sorted({node for number in numbers for node in left_out(run_dir, number)})


def _srun_args(cpus: int | None, nodes: int) -> list[str]:
    """srun no longer takes the cores from sbatch; of several nodes none goes on when the job's process on another died."""
    return ([] if cpus is None else [f"--cpus-per-task={cpus}"]) + (["--kill-on-bad-exit=1"] if nodes > 1 else [])


def _additional(config: Config) -> dict[str, Any]:
    """`requeue` is what our restarts rest on, where a site has turned it off by default too. `launcher.extra` wins."""
    reservation = {} if config.launcher.reservation is None else {"reservation": config.launcher.reservation}
    extra = {name.replace("_", "-"): value for name, value in config.launcher.extra.items()}
    return {name: value for name, value in {"requeue": True, **reservation, **extra}.items() if value is not False}


def signal_delay(config: Config) -> int:
    """Never more than half of the time limit: submitit would send no warning at all."""
    return min(config.launcher.signal_delay_s, config.launcher.timeout_min * 60 // 2)


def identities(folder: Path, count: int) -> list[Path]:
    return [identity_of_job(folder, job) for job in range(count)]


def signal_job(path: Path, signum: int) -> bool:
    """Signal the process that wrote this identity, if it is of this boot and still lives."""
    try:
        identity = json.loads(path.read_bytes())
    except FileNotFoundError:  # it has not started yet
        return False
    if identity["boot_id"] != boot_id() or not is_alive(identity["pid"], identity["started"]):
        return False
    send(identity["pid"], signum)
    return True


@contextlib.contextmanager
def handled(signums: Sequence[int], handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Children started here write to `path`. With our own pipe in their hands, whoever reads it would wait for them to end."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    with open(path, "ab") as file:
        for fd in kept:
            os.dup2(file.fileno(), fd)
    try:
        yield
    finally:
        for fd, original in kept.items():
            os.dup2(original, fd)
            os.close(original)


def _ignored(signums: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    return handled(signums, signal.SIG_IGN)
