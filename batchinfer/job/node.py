"""What runs on a node: a job that starts its replicas, watches them, restarts what died, and stops them when it is told.

`NodeJob` is plain values, so that submitit can pickle it and a human can read it. All state of the work is on disk: a job
that is requeued, or started again by hand, takes what is left.

Signals are only noted by handlers and acted on in the loop. SIGTERM, SIGINT and SIGHUP stop the replicas: SIGTERM to each
torchrun, `grace_s` later SIGKILL to whoever is left. SIGUSR2 is the warning before a time limit or a preemption. Before a
time limit the replicas stop by themselves, in time (`job.walltime`); before a preemption they are stopped as above. Then the
handler found (submitit's: checkpoint, requeue, exit) is called, unless the submission's requeues are used up.

A replica that ends as every further try would is not started again. Unless this node alone is at fault (`job.blame`), the whole
submission has failed, and ends (`job.failure`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from batchinfer.job.attempts import Gain, record_death
from batchinfer.job.blame import Inquiry, Verdict, examined, failure_of
from batchinfer.job.failure import Failure, has_failed, publish_failure
from batchinfer.job.left_out import cancel_others, has_failed_here, left_out, node_name, requeue_elsewhere
from batchinfer.job.narrowing import MOST_BARREN
from batchinfer.job.process import SignalNotes, boot_id, die_with_parent, start_time
from batchinfer.job.replica import (
    DONE,
    FAILED,
    FULL,
    HOPELESS,
    STANDALONE,
    STOPPED,
    Death,
    Replica,
    leave_death,
    read_progress,
    say,
    torchrun,
    torchrun_environment,
    wait_all,
)
from batchinfer.job.requeues import count_requeues, record_start
from batchinfer.job.retry import is_complete
from batchinfer.job.room import lasting_error
from batchinfer.job.rundir import RunDir
from batchinfer.job.span import LeadingReplica, Span, Word, call_together, follow
from batchinfer.job.walltime import WORK_UNTIL, Walltime
from batchinfer.publish import replace_bytes

POLL_S = 0.1
CANCEL_POLL_S = 1.0
LINGER_S = 600.0  # more than any KillWait


class TooFewDevices(RuntimeError):
    """A node shows fewer GPUs than its job needs."""


def identity_of_job(folder: Path, job: int) -> Path:
    """Where a job writes which process it is."""
    return folder / f"job-{job:02d}.json"


@dataclass(frozen=True)
class NodeJob:
    """One job of a submission. Call it in the main thread: returns 0 (complete, or nothing failed), 1, or 3 (stopped).

    `visible_devices`: the outer device mask, one entry per GPU (indices, UUIDs, MIG ids); empty: no GPU; None: whatever
    the node's own CUDA_VISIBLE_DEVICES says when the job starts, else the first `replicas * tensor_parallel`.
    `nodes`: of the one replica, where it spans several; `tensor_parallel` counts the ranks of all of them. Each node calls
    its own copy of the job. `command` stands in for torchrun and the worker (tests).
    """

    run_dir: str
    submission: int
    job: int
    replicas: int
    tensor_parallel: int
    visible_devices: tuple[str, ...] | None
    env: dict[str, str] = field(default_factory=dict)
    cpus_per_rank: int | None = None  # None: the cores of this process, shared out
    setup: tuple[str, ...] = ()
    nodes: int = 1
    max_restarts: int = 2
    grace_s: float = 10.0
    time_limit_s: float | None = None  # from its start; None: it has none of its own
    warning_s: float = 120.0  # how long before the limit SIGUSR2 comes
    max_requeues: int = 100  # of all jobs of the submission together
    stall_timeout_s: float = 300.0  # for which a rank may stand still
    worker_module: str = "batchinfer.worker"
    command: tuple[str, ...] | None = None

    def __call__(self) -> int:
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            die_with_parent(death_signal=signal.SIGTERM)  # without its controller nobody could stop it
        if self.nodes == 1:
            return _Node(self).run()
        span = Span.here(self.nodes, self.folder, self.job)
        return _Lead(self, span).run() if span.node == 0 else _follow(self, span)

    @property
    def folder(self) -> Path:
        return RunDir(Path(self.run_dir)).submission(self.submission)

    @property
    def ranks_here(self) -> int:
        """Of one replica, on this node."""
        return self.tensor_parallel // self.nodes

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue: the same job. Everything it needs to go on is on disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self))

    def devices(self) -> list[tuple[str, ...]]:
        """The GPUs of each replica. Raises TooFewDevices."""
        needed = self.replicas * self.ranks_here
        visible = self._visible(needed)
        if visible and len(visible) < needed:
            raise TooFewDevices(
                f"job {self.job} needs {needed} GPUs ({self.replicas} replicas of {self.ranks_here}), but "
                f"{socket.gethostname()} shows {len(visible)}: CUDA_VISIBLE_DEVICES={','.join(visible)}"
            )
        size = self.ranks_here
        return [visible[k * size : (k + 1) * size] for k in range(self.replicas)]

    def _visible(self, needed: int) -> tuple[str, ...]:
        if self.visible_devices is not None:
            return self.visible_devices
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        return tuple(mask.split(",")) if mask else tuple(str(i) for i in range(needed))

    def environment(self, slot: int) -> dict[str, str]:
        """Of a replica, or of its part on this node."""
        threads = self.cpus_per_rank or max(1, len(os.sched_getaffinity(0)) // (self.replicas * self.ranks_here))
        return torchrun_environment(os.environ, self.env, self.devices()[slot], threads)

    def torchrun(self, name: str, rendezvous: Sequence[str] = STANDALONE) -> tuple[str, ...]:
        ranks = torchrun(self.ranks_here, RunDir(Path(self.run_dir)).replica(name) / "ranks", rendezvous)
        return self.command or (*ranks, "-m", self.worker_module)


class _Node:
    """A NodeJob at work."""

    def __init__(self, job: NodeJob) -> None:
        self.job, self.run_dir = job, RunDir(Path(job.run_dir))
        self.inquiry = Inquiry(self.run_dir, job.submission)
        self.running: dict[int, Replica] = {}
        self.restarts = dict.fromkeys(range(job.replicas), 0)
        self.barren = dict.fromkeys(range(job.replicas), 0)  # deaths in a row after which nothing had been gained
        self.failed: set[int] = set()
        self.walltime = Walltime.of_this_job(job.time_limit_s, job.warning_s)
        self.next_look = 0.0
        self.is_cancelled = False
        self.has_failed = False  # the submission, as we found or another job did
        self.has_stopped = False  # a replica, by itself

    def run(self) -> int:
        try:
            return self._run()
        except OSError:
            if (error := lasting_error(self.run_dir.root)) is None:
                raise
            if not self.has_failed:
                self._fail(Failure.of_disk(self.run_dir, error, node_name(), str(self.job.folder)))
            return FAILED

    def _run(self) -> int:
        if self._look_for_cancel():
            return FAILED if self.has_failed else STOPPED
        record_start(self.job.folder, self.job.job)
        if self._requeues_used_up(count_requeues(self.job.folder) > self.job.max_requeues):
            return STOPPED
        self._write_identity()
        with SignalNotes() as notes:
            if self._may_leave() and node_name() in left_out(self.run_dir, self.job.submission):
                self._leave_node()
            try:
                for slot in range(self.job.replicas):
                    self._start(slot)
                stopped = self._watch(notes)
            finally:
                for replica in self.running.values():
                    replica.kill()
            if self.has_failed:
                return FAILED
            if stopped:
                return self._after_stop(notes)
            if not self.failed or is_complete(self.run_dir):
                return DONE
            self._leave_node()
            return FAILED

    def _leave_node(self) -> None:
        """Where the node is at fault and not the request, the job goes on elsewhere. Then this does not return."""
        run_dir, submission = self.run_dir, self.job.submission
        if self._may_leave() and has_failed_here(run_dir, submission) and requeue_elsewhere(run_dir, submission):
            sys.exit(1)  # as submitit leaves a job that it has put back: without a result

    def _may_leave(self) -> bool:
        slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        return slurm and count_requeues(self.job.folder) < self.job.max_requeues

    def _watch(self, notes: SignalNotes) -> bool:
        """Until every replica has ended, and it is known why. True: they were stopped."""
        while self.running or self.inquiry.deaths:
            if self._must_stop(notes):
                self._stop(notes)
                return True
            for slot, replica in list(self.running.items()):
                code = replica.exit_code()
                if code is not None:
                    self._ended(slot, replica, code)
            self._judge()
            time.sleep(POLL_S)
        return notes.stop_asked or self.has_stopped or self._look_for_cancel(now=True)

    def _must_stop(self, notes: SignalNotes) -> bool:
        preempted = notes.warnings > 0 and not self.walltime.explains_warning()
        return bool(notes.stops) or preempted or self.walltime.is_over or self._look_for_cancel()

    def _start(self, slot: int) -> None:
        name = self.run_dir.new_replica(f"{self.job.submission:02d}-{self.job.job}-{slot}")
        try:
            self.running[slot] = self._replica(slot, name)
        except TooFewDevices as error:
            self._hopeless(slot, Death(name, HOPELESS, str(error), str(self.job.folder), node=node_name(), early=True))

    def _replica(self, slot: int, name: str) -> Replica:
        job = self.job
        command, env = job.torchrun(name), self._environment(slot)
        return Replica(self.run_dir, job.submission, name, command, env, job.setup, stall_timeout_s=job.stall_timeout_s)

    def _environment(self, slot: int) -> dict[str, str]:
        return {**self.job.environment(slot), WORK_UNTIL: str(self.walltime.work_until)}

    def _ended(self, slot: int, replica: Replica, code: int) -> None:
        del self.running[slot]
        replica.kill()  # torchrun killed by SIGKILL leaves ranks behind, and they hold GPU memory
        self.failed.discard(slot)
        self.has_stopped |= code == STOPPED
        if code not in (DONE, STOPPED):
            made_progress = replica.has_committed()
            node = node_name() if self.job.nodes == 1 else ""
            death = examined(self.run_dir, replace(replica.death(code), node=node, early=not made_progress))
            if death.is_hopeless:
                return self._hopeless(slot, death)
            gain = self._record(death)
            early = not (made_progress or gain.of_rows)
            self._died(slot, replace(death, early=early), made_progress, gain)

    def _hopeless(self, slot: int, death: Death) -> None:
        """To try it again here is no use. What it means for the submission shows by what becomes of the others."""
        self.failed.add(slot)
        leave_death(self.run_dir, replace(death, undecided=True))
        self.inquiry.open(death)

    def _judge(self) -> None:
        verdict = self.inquiry.judge() if self.inquiry.deaths else None
        if verdict is None:
            return
        deaths, self.inquiry.deaths = self.inquiry.deaths, []
        if verdict is Verdict.REQUEST:
            return self._fail(failure_of(deaths))
        for death in deaths:
            self._tell(death)

    def _fail(self, failure: Failure) -> None:
        """The submission ends. Where that cannot be written, SLURM ends the other jobs, and this one's exit code tells."""
        self.has_failed = True
        say(f"batchinfer: {failure.sentence(self.run_dir)}")
        told = publish_failure(self.run_dir, self.job.submission, failure)
        cancel_others(running_too=not told)
        if not told and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            sys.exit(FULL)

    def _record(self, death: Death) -> Gain:
        """Which units may have killed it. Somebody's SIGTERM is none of theirs, nor what the worker lays to its surroundings."""
        try:
            said = read_progress(self.run_dir, death.replica)
            if death.exit_code == -signal.SIGTERM or (said.get("is_outside") and said["error"] == death.reason):
                return Gain()
            return record_death(self.run_dir, death.replica, death.reason, said.get("held", ()))
        except OSError as error:
            print(f"cannot record it in {self.run_dir.attempts} ({error.strerror})", file=sys.stderr, flush=True)
            return Gain()

    def _may_restart(self, slot: int, made_progress: bool, gain: Gain) -> bool:
        """What dies before it has done anything would only die again, unless it is known better now which rows are the cause."""
        self.barren[slot] = 1 if made_progress or gain.passed else self.barren[slot] + 1
        if gain.of_rows:
            self.restarts[slot] -= gain.suspected and self.restarts[slot] > 0  # for its first death is explained with this one
            return self.barren[slot] <= MOST_BARREN
        self.restarts[slot] += 1
        return (made_progress or gain.recorded) and self.restarts[slot] <= self.job.max_restarts

    def _died(self, slot: int, death: Death, made_progress: bool, gain: Gain) -> None:
        if self._may_restart(slot, made_progress, gain):
            self._start(slot)
            death = replace(death, restarted_as=self.running[slot].name)
        else:
            self.failed.add(slot)
        self._tell(death)

    def _tell(self, death: Death) -> None:
        say(death.sentence())
        leave_death(self.run_dir, death)

    def _stop(self, notes: SignalNotes) -> None:
        for replica in self.running.values():
            replica.terminate()
        deadline = time.monotonic() + self.job.grace_s
        while not notes.kill_asked and time.monotonic() < deadline:
            if wait_all(list(self.running.values()), POLL_S):
                break
        for replica in self.running.values():
            replica.kill()

    def _after_stop(self, notes: SignalNotes) -> int:
        """Hand over to submitit after a warning, or when replicas ran out of time; under SLURM wait to be killed after a SIGTERM.

        SLURM sends SIGTERM before a requeue or preemption too. To return then would leave a result file, by which
        submitit takes a job that runs again later for finished.
        """
        deadline = time.monotonic() + LINGER_S
        requeue = notes.previous.get(signal.SIGUSR2)
        while not self._look_for_cancel(now=True) and not is_complete(self.run_dir):
            if (notes.warnings or self.has_stopped or self.walltime.is_over) and callable(requeue):
                if self._requeues_used_up(count_requeues(self.job.folder) >= self.job.max_requeues):
                    break
                requeue(signal.SIGUSR2, None)  # exits the process
            if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return STOPPED

    def _requeues_used_up(self, used_up: bool) -> bool:
        if used_up:
            jobs, most = f"the jobs of submission {self.job.submission:02d}", self.job.max_requeues
            then = f"it ends here; finish the run with: python -m batchinfer resume {self.run_dir.root}"
            print(f"{jobs} have been requeued launcher.max_requeues={most} times; {then}", file=sys.stderr, flush=True)
        return used_up

    def _look_for_cancel(self, now: bool = False) -> bool:
        """Whether `cancel` was asked of this run, or the submission has failed; looks at the disk once a second."""
        if now or time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + CANCEL_POLL_S
            self.is_cancelled = self.run_dir.is_cancelled(self.job.submission)
            self.has_failed = self.has_failed or has_failed(self.run_dir, self.job.submission)
        return self.is_cancelled or self.has_failed

    def _write_identity(self) -> None:
        pid = os.getpid()
        identity = {"pid": pid, "started": start_time(pid), "boot_id": boot_id(), "host": socket.gethostname()}
        replace_bytes(identity_of_job(self.job.folder, self.job.job), json.dumps(identity).encode())


class _Lead(_Node):
    """A NodeJob at work on the first of the nodes that its replica spans."""

    def __init__(self, job: NodeJob, span: Span) -> None:
        super().__init__(job)
        self.span = span

    def run(self) -> int:
        try:
            return super().run()
        finally:
            self.span.say(Word(over=True))

    def _replica(self, slot: int, name: str) -> Replica:
        word = call_together(name)
        command = self.job.torchrun(name, self.span.rendezvous(word))
        env, timeout_s = self._environment(slot), self.job.stall_timeout_s
        return LeadingReplica(self.span, word, self.run_dir, self.job.submission, command, env, timeout_s)


def _follow(job: NodeJob, span: Span) -> int:
    """A NodeJob at work on one of the other nodes. Under SLURM it outlives its part: a task that returned while the job is put
    back into the queue would leave a result file."""
    run_dir, env = RunDir(Path(job.run_dir)), job.environment(0)

    def start(word: Word) -> Replica:
        name = str(word.replica)
        command = job.torchrun(name, span.rendezvous(word))
        timeout_s = job.stall_timeout_s
        return Replica(run_dir, job.submission, name, command, env, log_name=span.log_name, stall_timeout_s=timeout_s)

    with SignalNotes():
        follow(span, run_dir, start)
    return DONE
