"""Where the jobs of a submission run: on this host, under SLURM, or in this very process; and how they are stopped.

`run_job` places `NodeJob`s, shows the run until it ends, and stops what it started when it is interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchinfer import hardware
from batchinfer.config import Config, ConfigError, show
from batchinfer.data.writer import read_footer
from batchinfer.job.failure import Failure, read_failure, set_aside
from batchinfer.job.logs import LogFollower
from batchinfer.job.node import NodeJob
from batchinfer.job.placing import Placed, SlurmJobs, handled, identities, place_local, place_slurm, signal_delay, signal_job
from batchinfer.job.process import STOP_SIGNALS, boot_id, start_time
from batchinfer.job.replica import DONE, FAILED, STOPPED
from batchinfer.job.retry import is_complete, unfinished
from batchinfer.job.room import lasting_error
from batchinfer.job.rundir import RunDir
from batchinfer.job.site import check_limits
from batchinfer.publish import replace_bytes

INTERRUPTED = 130
SETTLE_S = 60.0  # jobs get so long to end by themselves once nothing is left to do, or once they are told to stop


def run_job(
    run_dir: RunDir, config: Config, command: Sequence[str] | None = None, expected: Mapping[str, Any] | None = None
) -> int:
    """Submit `config` (hardware resolved to facts) on a planned run; returns the exit code of the command line.

    0: complete, and not more error rows than allowed (or submitted, when `launcher.wait` is false); 1: rows are missing or
    too many are errors; 130: interrupted, everything that was started is stopped. Raises ConfigError when the jobs cannot
    be placed. `expected`: what the plan predicts, kept for the report. `command` stands in for torchrun and the worker (tests).
    """
    kind = resolve_kind(config)
    check_placeable(kind, config)
    check_completions(run_dir)
    if is_complete(run_dir):
        print(f"{run_dir.root}: complete already, so nothing is submitted", flush=True)
        return _finish(run_dir, config)
    number, folder = run_dir.new_submission()
    set_aside(run_dir, number)
    logs = LogFollower(run_dir, number) if config.verbose else None
    jobs = make_jobs(run_dir, number, config, kind, command)
    with _stop_signals_interrupt(kind):
        if kind == "inline":
            _write_submission(folder, kind, [str(os.getpid())], config, expected)
            return _run_inline(run_dir, config, jobs[0], logs)
        _write_submission(folder, kind, [], config, expected)  # before the jobs, which read their config there
        placed: Placed = place_slurm(run_dir, config, folder, jobs) if kind == "slurm" else place_local(config, folder, jobs)
        _write_submission(folder, kind, placed.ids, config, expected)
        print(f"submission {number:02d}: {kind} jobs {', '.join(placed.ids)} on {run_dir.root}", flush=True)
        if not config.launcher.wait:
            print(f"watch it with: python -m batchinfer status {run_dir.root} --watch", flush=True)
            return DONE
        return _wait(run_dir, number, config, placed, logs)


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
    if kind != "slurm" and hw.nodes_per_replica > 1:
        raise ConfigError(
            f"{show('hw.nodes_per_replica', hw.nodes_per_replica)}: launcher.kind={kind} has one node; it needs slurm"
        )
    if kind == "inline" and nodes > 1:
        raise ConfigError(f"{show('launcher.nodes', nodes)}: launcher.kind=inline runs in this process, so it must be 1")
    if kind == "local" and nodes > 1 and hw.gpu is not None:
        raise ConfigError(
            f"{show('launcher.nodes', nodes)}: local jobs would share this host's GPUs, so it must be 1 (or use launcher=slurm)"
        )
    if kind == "slurm":
        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise ConfigError(f"launcher.kind=slurm: {program} is not on the PATH; without SLURM use launcher=local")
        check_limits(config)
    elif hw.gpu is not None and len(outer_devices(hw.gpus_per_node)) < hw.gpus_per_node:
        mask = os.environ["CUDA_VISIBLE_DEVICES"]
        raise ConfigError(
            f"{show('hw.gpus_per_node', hw.gpus_per_node)}: must be at most the number of devices in CUDA_VISIBLE_DEVICES={mask}"
        )
    elif hw.gpu is not None and (count := len(hardware.visible_gpus())) < hw.gpus_per_node:
        raise ConfigError(
            f"{show('hw.gpus_per_node', hw.gpus_per_node)}: must be at most {count}, the GPUs that this host shows, as "
            f"launcher.kind={kind} runs here; choose hw=auto, hw=cpu or launcher=slurm"
        )


def check_completions(run_dir: RunDir) -> None:
    """Raises ConfigError for a file in completions/ that is not whole: its rows would count as done."""
    for unit, generation in run_dir.done_units().items():
        run_dir.read_committed(unit, generation, read_footer)


def outer_devices(count: int) -> tuple[str, ...]:
    """This process's device mask as data: the local executor overwrites the variable with 0..n-1."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return tuple(str(i) for i in range(count))
    return tuple(name.strip() for name in mask.split(",") if name.strip())


def make_jobs(run_dir: RunDir, number: int, config: Config, kind: str, command: Sequence[str] | None = None) -> list[NodeJob]:
    """One job per node, or per group of nodes that a replica spans, as plain values."""
    hw, launcher = config.hw, config.launcher
    ranks = int(hw.tensor_parallel)
    devices: tuple[str, ...] | None = None if kind == "slurm" else outer_devices(hw.gpus_per_node)[: hw.gpus_per_node]
    return [
        NodeJob(
            run_dir=str(run_dir.root.absolute()),
            submission=number,
            job=job,
            replicas=hw.gpus_per_node * hw.nodes_per_replica // ranks,
            tensor_parallel=ranks,
            nodes=hw.nodes_per_replica,
            visible_devices=() if hw.gpu is None else devices,
            env={name: str(value) for name, value in hw.env.items()},
            cpus_per_rank=hw.cpus_per_gpu or _cores_per_rank(config, kind),
            setup=() if kind == "slurm" else tuple(launcher.setup),  # under SLURM the batch script runs it
            time_limit_s=None if kind == "inline" else 60.0 * launcher.timeout_min,
            warning_s=signal_delay(config),
            max_requeues=launcher.max_requeues,
            stall_timeout_s=config.engine.stall_timeout_s,
            command=tuple(command) if command else None,
        )
        for job in range(launcher.nodes // hw.nodes_per_replica)
    ]


def _cores_per_rank(config: Config, kind: str) -> int | None:
    """Local jobs share this host, unless OMP_NUM_THREADS says what they may use; what a SLURM job gets it sees when it runs."""
    if kind == "slurm":
        return None
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    ranks = config.launcher.nodes * config.hw.gpus_per_node
    return max(1, hardware.usable_cores() // ranks)


def _run_inline(run_dir: RunDir, config: Config, job: NodeJob, logs: LogFollower | None) -> int:
    """The job runs in this process's main thread, where its signal handlers must be, and the display in another one: so
    there is no second process whose death would have to be watched, and what `salloc` signals arrives at the job itself."""
    ended = threading.Event()
    watching = threading.Thread(target=_show_inline, args=(run_dir, ended, logs), name="display", daemon=True)
    watching.start()
    try:
        code = job()
    finally:
        ended.set()
        watching.join()
    if code == FAILED and _why(run_dir, job.submission):
        return FAILED  # the job has said it, in this terminal
    if code == STOPPED and not run_dir.is_cancelled(job.submission):
        return _interrupted(run_dir, config)
    return _finish(run_dir, config)


def _show_inline(run_dir: RunDir, ended: threading.Event, logs: LogFollower | None) -> None:
    """The job itself tells of deaths, in the same terminal, and of a run directory that can no longer be read."""
    from batchinfer import display

    with contextlib.suppress(ConfigError, OSError):
        display.watch(run_dir, lambda: not ended.is_set(), on_event=lambda sentence: None, logs=logs)


def _wait(run_dir: RunDir, number: int, config: Config, placed: Placed, logs: LogFollower | None) -> int:
    from batchinfer import display

    try:
        display.watch(run_dir, lambda: placed.alive() and read_failure(run_dir, number) is None, logs=logs)
        if read_failure(run_dir, number) is None or is_complete(run_dir):
            _settle(placed)
        if failure := _why(run_dir, number):
            return _give_up(run_dir, failure, placed)
        if not is_complete(run_dir):
            for sentence in placed.failures():
                print(sentence, file=sys.stderr, flush=True)
        return _finish(run_dir, config)
    except (ConfigError, OSError):  # the run directory can no longer be read: nobody would watch the jobs
        _stop(placed)
        raise
    except KeyboardInterrupt:
        print("stopping the jobs; once more to kill them", file=sys.stderr, flush=True)
        try:
            _stop(placed)
        except KeyboardInterrupt:
            placed.kill()
        return _interrupted(run_dir, config)


def _why(run_dir: RunDir, number: int) -> Failure | None:
    """Why the submission has failed; what no job could write this process finds out by itself, as it writes to the same disk."""
    if is_complete(run_dir):
        return None
    failure = read_failure(run_dir, number)
    if failure is None and (error := lasting_error(run_dir.root)):
        failure = Failure.of_disk(run_dir, error, socket.gethostname(), str(run_dir.submission(number)))
    return failure


def _give_up(run_dir: RunDir, failure: Failure, placed: Placed) -> int:
    placed.stop()
    print(f"batchinfer: {failure.sentence(run_dir)}", file=sys.stderr, flush=True)
    _stop(placed)
    return FAILED


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


def _interrupted(run_dir: RunDir, config: Config) -> int:
    if is_complete(run_dir):  # it came too late to stop anything
        return _finish(run_dir, config)
    print(f"interrupted; finish it with: python -m batchinfer resume {run_dir.root}", file=sys.stderr, flush=True)
    return INTERRUPTED


def _finish(run_dir: RunDir, config: Config) -> int:
    """The report, and the exit code by what is on disk."""
    from batchinfer.report import report

    run_dir.supersede()  # a retry that was killed between a commit and this left both generations
    report(run_dir)
    if not is_complete(run_dir):
        what = "the retry is not at its end" if unfinished(run_dir) else "rows are missing"
        print(f"{what}; finish it with: python -m batchinfer resume {run_dir.root}", file=sys.stderr, flush=True)
        return FAILED
    summary = json.loads((run_dir.report / "summary.json").read_bytes())
    share = summary["error_rows"] / max(1, summary["samples"])
    if share > config.max_error_fraction:
        print(
            f"{share:.1%} of the rows are errors, more than {show('max_error_fraction', config.max_error_fraction)}",
            file=sys.stderr,
            flush=True,
        )
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
            jobs = identities(path.parent, submission["config"]["launcher"]["nodes"])
            told += sum(signal_job(job, signal.SIGTERM) for job in jobs)
    return told


def _scancel(ids: Sequence[str]) -> int:
    jobs = SlurmJobs(list(ids))
    if not jobs.alive():
        return 0
    jobs.stop()
    return len(ids)


def _write_submission(folder: Path, kind: str, ids: Sequence[str], config: Config, expected: Mapping[str, Any] | None) -> None:
    pid = os.getpid()
    record = {
        "kind": kind,
        "jobs": list(ids),
        "pid": pid,
        "started": start_time(pid),
        "boot_id": boot_id(),
        "host": socket.gethostname(),
        "config": config.to_dict(),
        "expected": expected,
    }
    replace_bytes(folder / "submission.json", json.dumps(record, indent=1).encode(), durable=True)


def _stop_signals_interrupt(kind: str) -> contextlib.AbstractContextManager[None]:
    """Whatever is meant to stop this process stops the jobs as Ctrl-C does, instead of leaving them behind."""
    wanted = [signum for signum in stop_signals(kind) if signal.getsignal(signum) is not signal.SIG_IGN]
    return handled(wanted, signal.default_int_handler)


def stop_signals(kind: str) -> tuple[int, ...]:
    """Jobs under SLURM outlive a lost connection (SIGHUP); nothing else does on this host, where they would run unseen."""
    return tuple(signum for signum in STOP_SIGNALS if kind != "slurm" or signum != signal.SIGHUP)
