"""One replica as its job sees it: a torchrun with its ranks, all of which live and die together.

The ranks' output goes to `replicas/<name>/log.txt`, each line marked with its rank, and to a file per rank below
`replicas/<name>/ranks/`. A replica that died leaves a `died.json` beside them, which says why in one sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import batchinfer
from batchinfer.job.process import MARK, command_of_child, kill_marked, send
from batchinfer.job.rundir import RunDir, parse_completion
from batchinfer.job.vitals import FOLDER, LastWord, Vitals
from batchinfer.job.watchdog import Watchdog
from batchinfer.publish import replace_bytes

DONE, FAILED, STOPPED = 0, 1, 3  # exit codes of a worker, and of a job
BEREAVED = 4  # exit code of a worker that ended because another rank of its replica had died
# Exit codes of a worker that failed as every other try would. FULL: there is no space for the run's files, wherever it works.
HOPELESS, FULL = 5, 6
TAIL_BYTES = 65536
SENTENCE = "batchinfer: "  # begins the line in which a worker says why it fails
TRACEBACK = "Traceback (most recent call last):"
RANK_LINE = re.compile(r"^\[rank(\d+)\]: ?(.*)$")
FAILURE = re.compile(r"^ *rank +: (\d+) \(local_rank.*\n *exitcode +: (-?\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Death:
    """Why and where a replica died. `restarted_as` is None when it is given up."""

    replica: str
    exit_code: int  # of the rank that failed first; negative: the signal that killed it
    reason: str
    log: str
    restarted_as: str | None = None
    node: str = ""  # by SLURM's name; empty when it spanned several
    early: bool = False  # before it had committed anything, and not by rows
    undecided: bool = False  # whether it is this node's fault or the request's: then it is not told yet

    @property
    def is_hopeless(self) -> bool:
        return self.exit_code in (HOPELESS, FULL)

    def sentence(self) -> str:
        then = f"restarted as {self.restarted_as}" if self.restarted_as else "not restarted"
        return f"replica {self.replica} died ({self.reason}); {then}; log: {self.log}"


STANDALONE = ("--standalone", "--nnodes=1")  # takes a free port by itself


def torchrun(ranks: int, log_dir: Path, rendezvous: Sequence[str] = STANDALONE) -> list[str]:
    """`ranks`: on this node. Every rank prints to both the common log, marked, and its own file."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={ranks}",
        "--max-restarts=0",
        "--role=rank",
        "--tee=3",
        f"--log-dir={log_dir}",
    ]


class Replica:
    """A started replica. `command` is followed by RUN_DIR --replica NAME --submission N."""

    def __init__(
        self,
        run_dir: RunDir,
        submission: int,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        setup: Sequence[str] = (),
        log_name: str = "log.txt",
        stall_timeout_s: float = math.inf,
    ) -> None:
        """It is killed when one of its ranks stands still for `stall_timeout_s`; where it does nothing that can be counted,
        several times as long (`job.watchdog`)."""
        self.name, self._run_dir = name, run_dir
        self.log = run_dir.replica(name) / log_name
        self._mark = f"{mark_of_job(run_dir, submission)}{name}:{secrets.token_hex(8)}"
        self._commits_before = set(os.listdir(run_dir.completions))
        full = [*command, str(run_dir.root), "--replica", name, "--submission", str(submission)]
        self._vitals = Vitals.make()
        self._process = self._start(command_of_child(full, setup), {**env, MARK: self._mark, FOLDER: str(self._vitals.folder)})
        self._last_word: LastWord | None = None
        self._watchdog = Watchdog(self._vitals, self._mark, stall_timeout_s)
        self._watchdog.start()

    def _start(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # SIGUSR2 stays blocked until the child ignores it; one that reaches us meanwhile waits, and is not lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            with open(self.log, "ab") as log:
                null = subprocess.DEVNULL
                return subprocess.Popen(command, env=env, stdin=null, stdout=log, stderr=log, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def exit_code(self) -> int | None:
        """None while it lives; else the worker's code. torchrun itself only ever says 1: the worker's is in its last words."""
        code = self._process.poll()
        if code is None or code == DONE:
            return code
        first = first_failure(_tail(self.log))
        self._last_word = self._last_word or self._vitals.last_word()
        return first.exit_code if first else self._last_word.exit_code if self._last_word else code

    def terminate(self) -> None:
        """Ask it to stop gracefully; torchrun hands the signal on to its ranks."""
        if self._process.poll() is None:
            send(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End every process of it, torchrun's ranks in their own sessions included, and wait until they are gone."""
        left = kill_marked(self._mark)
        if left:
            print(f"replica {self.name}: processes {left} do not die (stuck in the kernel?)", file=sys.stderr, flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._watchdog.close()
        self._vitals.remove()

    def leave_stacks(self) -> None:
        """Of its ranks on this node, when they stand still; before `kill`, where another node ends it."""
        self._watchdog.ask()
        self._stalled("")

    def has_committed(self) -> bool:
        """Whether a completions file of this replica appeared since it started. Only footers of newer files are read."""
        from batchinfer.data.writer import read_footer  # pyarrow, which a job needs only when a replica died

        new = set(os.listdir(self._run_dir.completions)) - self._commits_before
        read = self._run_dir.read_committed
        return any(read(*parsed, read_footer).replica == self.name for parsed in map(parse_completion, new) if parsed)

    def death(self, exit_code: int) -> Death:
        return Death(self.name, exit_code, self._reason(exit_code), str(self.log))

    def _reason(self, exit_code: int) -> str:
        if self._watchdog.verdict is not None:
            return self._stalled(self._watchdog.verdict)
        tail = _tail(self.log)
        first = first_failure(tail)
        if first is None and self._last_word is not None:  # torchrun could not even say how it ended: a full disk cuts logs
            return self._last_word.sentence
        if first is None or first.rank == 0:
            told = read_progress(self._run_dir, self.name).get("error")
            if told:
                return str(told)
        words = None if exit_code < 0 and exit_code != -signal.SIGABRT else last_words(tail)
        if words is None:  # other signals leave no time for a word: the log's last line has nothing to do with them
            return (
                f"rank {first.rank} was {_describe_exit(exit_code)}" if first and first.of_several else _describe_exit(exit_code)
            )
        return f"rank {first.rank}: {words}" if first and first.rank > 0 else words

    def _stalled(self, verdict: str) -> str:
        folder = self._run_dir.replica(self.name)
        try:
            for rank, stacks in self._watchdog.stacks.items():
                (folder / f"stacks-rank{rank}.txt").write_text(stacks)
        except OSError as error:
            return f"{verdict}; no stacks: {error.strerror}"
        return f"{verdict}; stacks: {folder}/stacks-rank*.txt" if self._watchdog.stacks else verdict


def mark_of_job(run_dir: RunDir, submission: int) -> str:
    """The beginning of the marks of all replicas of one submission."""
    return f"{run_dir.root.absolute()}:{submission:02d}:"


def torchrun_environment(
    base: Mapping[str, str], extra: Mapping[str, str], devices: Sequence[str], threads: int
) -> dict[str, str]:
    """The environment of one replica's torchrun: `base` (this process's), ours, then the tier's `extra`, which wins."""
    package_root = str(Path(batchinfer.__file__).parent.parent)
    paths = [package_root, *filter(None, [extra.get("PYTHONPATH"), base.get("PYTHONPATH")])]
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that CUDA's indices are those of nvidia-smi and NVML
        "PYTHONUNBUFFERED": "1",
    }
    fixed = {"CUDA_VISIBLE_DEVICES": ",".join(devices), "PYTHONPATH": os.pathsep.join(paths)}
    return {**base, **ours, **extra, **fixed}


def read_progress(run_dir: RunDir, name: str) -> dict[str, Any]:
    """The replica's own word on itself; empty before its first, and when something else stands in its place."""
    try:
        progress = json.loads(run_dir.progress(name).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return progress if isinstance(progress, dict) else {}


def write_death(run_dir: RunDir, death: Death) -> None:
    replace_bytes(run_dir.replica(death.replica) / "died.json", json.dumps(asdict(death)).encode())


def say(sentence: str) -> None:
    """Into the job's log, which a full disk may not take."""
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def leave_death(run_dir: RunDir, death: Death) -> None:
    """As far as it can be written: a full disk is often why it died."""
    try:
        write_death(run_dir, death)
    except OSError as error:
        say(f"cannot write {error.filename} ({error.strerror})")


def read_death(run_dir: RunDir, name: str) -> Death | None:
    try:
        return Death(**json.loads((run_dir.replica(name) / "died.json").read_bytes()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class RankFailure:
    """How a rank ended; `of_several`: it was not the only one."""

    rank: int
    exit_code: int
    of_several: bool


def first_failure(log: str) -> RankFailure | None:
    """The rank that failed first, by the last words of torchrun; None when it has not said them.

    It names as root cause what it saw first, and of what it saw at once the lowest rank; but a rank knows when it is not the
    culprit, and SIGTERM is what torchrun itself ends the others with.
    """
    *others, root = FAILURE.findall(log) or [None]
    if root is None:
        return None
    culprits = [found for found in (root, *others) if int(found[1]) not in (BEREAVED, -signal.SIGTERM)]
    rank, code = (culprits or [root])[0]
    return RankFailure(int(rank), int(code), bool(others))


def last_words(log: str) -> str | None:
    """What the rank that failed first said last: its own sentence, else its last line; without ranks (torchrun itself
    failed) the last line of all."""
    first = first_failure(log)
    said = [match for match in map(RANK_LINE.match, log.splitlines()) if match]
    lines = [match[2] for match in said if not first or int(match[1]) == first.rank] or (log.splitlines() if not said else [])
    ended = [line.strip() for line in reversed(lines) if line.strip() and line.strip() != TRACEBACK]  # a full disk cuts logs
    sentences = [line.removeprefix(SENTENCE) for line in ended if line.startswith(SENTENCE)]
    return next(iter(sentences or ended), None)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code} without a word"
    out_of_memory = "; often the host ran out of memory" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{out_of_memory}"


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def wait_all(replicas: Sequence[Replica], timeout_s: float) -> bool:
    """Wait until all are gone; False when some are left at the time-out."""
    deadline = time.monotonic() + timeout_s
    while any(replica.exit_code() is None for replica in replicas):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
