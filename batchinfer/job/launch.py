"""Where the jobs of a submission run: on this host, under SLURM, or in this very process; and how they are stopped.

`run_job` places `NodeJob`s, shows the run until it ends, and stops what it started when it is interrupted. submitit starts
and requeues; whether a job still lives is asked of the processes, or of squeue, which unlike sacct needs no accounting.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchinfer import hardware
from batchinfer.config import Config, ConfigError, show
from batchinfer.job.node import NodeJob, identity_of_job, is_complete
from batchinfer.job.process import STOP_SIGNALS, boot_id, is_alive, kill_marked, send, start_time
from batchinfer.job.replica import DONE, FAILED, STOPPED, mark_of_job
from batchinfer.job.rundir import RunDir
from batchinfer.publish import replace_bytes

INTERRUPTED = 130
SETTLE_S = 60.0  # jobs get so long to end by themselves once nothing is left to do, or once they are told to stop
SQUEUE_EVERY_S = 10.0


def run_job(run_dir: RunDir, config: Config, command: Sequence[str] | None = None) -> int:
    """Submit `config` (hardware resolved to facts) on a planned run; returns the exit code of the command line.

    0: complete, and not more error rows than allowed (or submitted, when `launcher.wait` is false); 1: rows are missing or
    too many are errors; 130: interrupted, everything that was started is stopped. Raises ConfigError when the jobs cannot
    be placed. `command` stands in for torchrun and the worker (tests).
    """
    kind = resolve_kind(config)
    check_placeable(kind, config)
    number, folder = run_dir.new_submission()
    jobs = make_jobs(run_dir, number, config, kind, command)
    with _sigterm_interrupts():
        if kind == "inline":
            return _run_inline(run_dir, config, folder, jobs[0])
        placed: Placed = _place_slurm(run_dir, config, folder, jobs) if kind == "slurm" else _place_local(config, folder, jobs)
        _write_submission(folder, kind, placed.ids, config)
        print(f"submission {number:02d}: {kind} jobs {', '.join(placed.ids)} on {run_dir.root}", flush=True)
        if not config.launcher.wait:
            print(f"watch it with: python -m batchinfer status {run_dir.root} --watch", flush=True)
            return DONE
        return _wait(run_dir, config, placed)


def resolve_kind(config: Config) -> str:
    """What `launcher.kind=auto` means: SLURM where sbatch is found, outside an allocation, and with a tier that is not this
    host (its GPUs are not here); else local."""
    kind, hw = config.launcher.kind, config.hw
    if kind != "auto":
        return kind
    if shutil.which("sbatch") is None or "SLURM_JOB_ID" in os.environ or hw.gpu in (None, "auto"):
        return "local"
    here = [gpu for gpu in hardware.visible_gpus() if gpu.gpu == hw.gpu]
    return "local" if len(here) >= hw.gpus_per_node else "slurm"


def check_placeable(kind: str, config: Config) -> None:
    """Raises ConfigError when jobs of this kind cannot be placed here."""
    nodes, hw = config.launcher.nodes, config.hw
    if kind == "inline" and nodes > 1:
        raise ConfigError(f"{show('launcher.nodes', nodes)}: launcher.kind=inline runs in this process, so it must be 1")
    if kind == "local" and nodes > 1 and hw.gpu is not None:
        raise ConfigError(f"{show('launcher.nodes', nodes)}: local jobs would share this host's GPUs, so it must be 1 "
                          "(or use launcher=slurm)")  # fmt: skip
    if kind == "slurm":
        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise ConfigError(f"launcher.kind=slurm: {program} is not on the PATH; without SLURM use launcher=local")
    elif hw.gpu is not None and len(outer_devices(hw.gpus_per_node)) < hw.gpus_per_node:
        mask = os.environ["CUDA_VISIBLE_DEVICES"]
        raise ConfigError(f"{show('hw.gpus_per_node', hw.gpus_per_node)}: must be at most the number of devices in "
                          f"CUDA_VISIBLE_DEVICES={mask}")  # fmt: skip


def outer_devices(count: int) -> tuple[str, ...]:
    """This process's device mask as data: the local executor overwrites the variable with 0..n-1."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return tuple(str(i) for i in range(count))
    return tuple(name.strip() for name in mask.split(",") if name.strip())


def make_jobs(run_dir: RunDir, number: int, config: Config, kind: str, command: Sequence[str] | None = None) -> list[NodeJob]:
    """One job per node, as plain values."""
    hw, launcher = config.hw, config.launcher
    ranks = int(hw.tensor_parallel)
    devices: tuple[str, ...] | None = None if kind == "slurm" else outer_devices(hw.gpus_per_node)[: hw.gpus_per_node]
    return [
        NodeJob(
            run_dir=str(run_dir.root.absolute()),
            submission=number,
            job=job,
            replicas=hw.gpus_per_node // ranks,
            tensor_parallel=ranks,
            visible_devices=() if hw.gpu is None else devices,
            env={name: str(value) for name, value in hw.env.items()},
            cpus_per_rank=hw.cpus_per_gpu or _cores_per_rank(config, kind),
            setup=() if kind == "slurm" else tuple(launcher.setup),  # under SLURM the batch script runs it
            command=tuple(command) if command else None,
        )
        for job in range(launcher.nodes)
    ]


def _cores_per_rank(config: Config, kind: str) -> int | None:
    """Local jobs share this host; what a SLURM job gets it sees only when it runs."""
    ranks = config.launcher.nodes * config.hw.gpus_per_node
    return None if kind == "slurm" else max(1, hardware.usable_cores() // ranks)


class Placed(Protocol):
    """Jobs that were started and can be asked and stopped."""

    @property
    def ids(self) -> list[str]: ...
    def alive(self) -> bool: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


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
        for job, path in zip(self.jobs, _identities(self.folder, len(self.jobs)), strict=True):
            if not job.done():
                send(int(job.job_id), signal.SIGKILL)
            _signal_job(path, signal.SIGKILL)
        kill_marked(self.mark)


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


def _place_local(config: Config, folder: Path, jobs: Sequence[NodeJob]) -> LocalJobs:
    import submitit

    launcher = config.launcher
    executor = submitit.LocalExecutor(folder=folder, max_num_timeout=launcher.max_requeues)
    executor.update_parameters(timeout_min=launcher.timeout_min, signal_delay_s=_signal_delay(config), stderr_to_stdout=True)
    # A Ctrl-C reaches the whole foreground group. The controllers must not see it: they would kill their job after one
    # second. Nor may the end of the terminal reach jobs that nobody waits for.
    shielded = [signal.SIGINT, *([] if launcher.wait else [signal.SIGHUP])]
    with _ignored(shielded), _output_to(folder / "controllers.log"):
        placed = [executor.submit(job) for job in jobs]
    return LocalJobs(folder, placed, mark_of_job(RunDir(Path(jobs[0].run_dir)), jobs[0].submission))


def _place_slurm(run_dir: RunDir, config: Config, folder: Path, jobs: Sequence[NodeJob]) -> SlurmJobs:
    import submitit

    executor = submitit.SlurmExecutor(folder=folder.absolute(), max_num_timeout=config.launcher.max_requeues)
    try:
        executor.update_parameters(**sbatch_parameters(run_dir, config))
        placed = executor.submit_array(list(jobs))
    except submitit.core.utils.FailedJobError as error:
        lines = [line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"launcher.kind=slurm: sbatch refused the job ({'; '.join(lines)}); check launcher.partition, account, "
                          "qos, constraint, timeout_min and extra, and what hw asks for") from error  # fmt: skip
    return SlurmJobs([str(job.job_id) for job in placed])


def sbatch_parameters(run_dir: RunDir, config: Config) -> dict[str, Any]:
    """What submitit's SlurmExecutor is told; one task on one node per element of the array."""
    hw, launcher = config.hw, config.launcher
    cpus = None if hw.cpus_per_gpu is None else hw.cpus_per_gpu * hw.gpus_per_node
    wanted = {
        "job_name": config.run_name or run_dir.root.name,
        "time": launcher.timeout_min,
        "nodes": 1,
        "ntasks_per_node": 1,
        "gpus_per_node": None if hw.gpu is None else hw.gpus_per_node,
        "cpus_per_task": cpus,
        "srun_args": None if cpus is None else [f"--cpus-per-task={cpus}"],  # srun no longer takes it from sbatch
        "mem": None if hw.mem_gb is None else f"{hw.mem_gb}GB",
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "setup": [*(f"module load {name}" for name in hw.modules), *launcher.setup] or None,
        "array_parallelism": launcher.array_parallelism or launcher.nodes,
        "signal_delay_s": _signal_delay(config),
        "stderr_to_stdout": True,
        "additional_parameters": _additional(config),
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _additional(config: Config) -> dict[str, Any]:
    """`requeue` is what our restarts rest on, where a site has turned it off by default too. `launcher.extra` wins."""
    reservation = {} if config.launcher.reservation is None else {"reservation": config.launcher.reservation}
    extra = {name.replace("_", "-"): value for name, value in config.launcher.extra.items()}
    return {"requeue": True, **reservation, **extra}


def _signal_delay(config: Config) -> int:
    """Never more than half of the time limit: submitit would send no warning at all."""
    return min(config.launcher.signal_delay_s, config.launcher.timeout_min * 60 // 2)


def _run_inline(run_dir: RunDir, config: Config, folder: Path, job: NodeJob) -> int:
    """The job runs in this process's main thread, where its signal handlers must be, and the display in another one: so
    there is no second process whose death would have to be watched, and what `salloc` signals arrives at the job itself."""
    from batchinfer import display

    _write_submission(folder, "inline", [str(os.getpid())], config)
    ended = threading.Event()
    watching = threading.Thread(target=display.watch, args=(run_dir, lambda: not ended.is_set()), name="display", daemon=True)
    watching.start()
    try:
        code = job()
    finally:
        ended.set()
        watching.join()
    if code == STOPPED and not run_dir.is_cancelled(job.submission):
        return _interrupted(run_dir)
    return _finish(run_dir, config)


def _wait(run_dir: RunDir, config: Config, placed: Placed) -> int:
    from batchinfer import display

    try:
        display.watch(run_dir, placed.alive)
        _settle(placed)
        return _finish(run_dir, config)
    except KeyboardInterrupt:
        print("stopping the jobs; once more to kill them", file=sys.stderr, flush=True)
        try:
            _stop(placed)
        except KeyboardInterrupt:
            placed.kill()
        return _interrupted(run_dir)


def _settle(placed: Placed) -> None:
    """Let the jobs write their last statistics and end; one that hangs with nothing left to do is stopped."""
    deadline = time.monotonic() + SETTLE_S
    while placed.alive():
        if time.monotonic() > deadline:
            return _stop(placed)
        time.sleep(0.1)


def _stop(placed: Placed) -> None:
    deadline = time.monotonic() + SETTLE_S
    while placed.alive() and time.monotonic() < deadline:
        placed.stop()  # again and again: it may not have been able to hear it yet
        time.sleep(1.0)
    if placed.alive():
        placed.kill()


def _interrupted(run_dir: RunDir) -> int:
    print(f"interrupted; finish it with: python -m batchinfer resume {run_dir.root}", file=sys.stderr, flush=True)
    return INTERRUPTED


def _finish(run_dir: RunDir, config: Config) -> int:
    """The report, and the exit code by what is on disk."""
    from batchinfer.report import report

    report(run_dir)
    if not is_complete(run_dir):
        print(f"rows are missing; finish them with: python -m batchinfer resume {run_dir.root}", file=sys.stderr, flush=True)
        return FAILED
    summary = json.loads((run_dir.report / "summary.json").read_bytes())
    share = summary["error_rows"] / max(1, summary["rows"])
    if share > config.max_error_fraction:
        print(f"{share:.1%} of the rows are errors, more than {show('max_error_fraction', config.max_error_fraction)}",
              file=sys.stderr, flush=True)  # fmt: skip
        return FAILED
    return DONE


def cancel_jobs(run_dir: RunDir) -> int:
    """Signal every job that a submission of this run recorded and that still lives; returns how many were told.

    SLURM jobs by scancel. Processes only on this host and only the very ones that were started, by their start time;
    those of other hosts see the run's stop mark within a second or two, which the caller has to set.
    """
    told = 0
    for path in sorted(run_dir.submissions.glob("*/submission.json")):
        submission = json.loads(path.read_bytes())
        if submission["kind"] == "slurm":
            told += _scancel(submission["jobs"])
        else:
            jobs = _identities(path.parent, submission["config"]["launcher"]["nodes"])
            told += sum(_signal_job(job, signal.SIGTERM) for job in jobs)
    return told


def _scancel(ids: Sequence[str]) -> int:
    jobs = SlurmJobs(list(ids))
    if not jobs.alive():
        return 0
    jobs.stop()
    return len(ids)


def _identities(folder: Path, count: int) -> list[Path]:
    return [identity_of_job(folder, job) for job in range(count)]


def _signal_job(path: Path, signum: int) -> bool:
    """Signal the process that wrote this identity, if it is of this boot and still lives."""
    try:
        identity = json.loads(path.read_bytes())
    except FileNotFoundError:  # it has not started yet
        return False
    if identity["boot_id"] != boot_id() or not is_alive(identity["pid"], identity["started"]):
        return False
    send(identity["pid"], signum)
    return True


def _write_submission(folder: Path, kind: str, ids: Sequence[str], config: Config) -> None:
    pid = os.getpid()
    record = {"kind": kind, "jobs": list(ids), "pid": pid, "started": start_time(pid), "boot_id": boot_id(),
              "host": socket.gethostname(), "config": config.to_dict()}  # fmt: skip
    replace_bytes(folder / "submission.json", json.dumps(record, indent=1).encode(), durable=True)


@contextlib.contextmanager
def _handled(signums: Sequence[int], handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
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
    return _handled(signums, signal.SIG_IGN)


def _sigterm_interrupts() -> contextlib.AbstractContextManager[None]:
    """SIGTERM and the end of the terminal stop the jobs as Ctrl-C does, instead of leaving them behind."""
    wanted = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    return _handled(wanted, signal.default_int_handler)
