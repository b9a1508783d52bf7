"""A real SLURM on one machine, from Debian's packages: munged, slurmctld, and nine slurmd that take themselves for nodes.

Every node has a host name, processes and mounts of its own (namespaces), so that none sees another's processes, and one goes
down whole. It claims 16 CPUs, 64 GB and 4 GPUs (character devices without a driver behind them). Network and files are shared.
There is no accounting: what we ask is asked of squeue and scontrol. Everything lies below `ROOT`, is found through SLURM_CONF
alone, and is gone afterwards.

There is one cluster, whoever uses it: `shared` starts it for the first of several pytest processes, and a guard, which waits
for the lock that all users hold, stops it behind the last, however that one ended. `python tests/slurm/cluster.py` holds one
for a person until Enter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path("/run/batchinfer-slurm")
USERS, STARTING = Path("/run/batchinfer-slurm.users"), Path("/run/batchinfer-slurm.starting")
NODES = [f"node{i}" for i in range(1, 10)]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter")
MAX_ARRAY_SIZE = 33
CONTROLLER_PORT, FIRST_NODE_PORT = 26817, 27001

# cred_expire is also how long a requeued job waits before it starts again; less than 5 means 120. preempt_send_user_signal:
# preemption sends the job's own warning signal. config_overrides: nodes may claim more than the host has. The partitions keep
# scenarios out of each other's way: `normal` for whole arrays, `preempt` below `urgent` on a node of their own, and nodes of
# `fragile` and `broken` may die or be spoilt.
SLURM_CONF = f"""\
ClusterName=tests
SlurmctldHost={{host}}(127.0.0.1)
SlurmctldPort={CONTROLLER_PORT}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={ROOT}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=4
MailProg=/bin/true
MaxArraySize={MAX_ARRAY_SIZE}
SlurmctldTimeout=30
SlurmdTimeout=30
StateSaveLocation={ROOT}/state
SlurmctldPidFile={ROOT}/slurmctld.pid
SlurmctldLogFile={ROOT}/slurmctld.log
SlurmdSpoolDir={ROOT}/spool.%n
SlurmdPidFile={ROOT}/%n.slurmd.pid
SlurmdLogFile={ROOT}/%n.log
PlugStackConfig=/dev/null
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{{nodes}}
PartitionName=normal Nodes=node[1-4] Default=YES MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=node[1-4] MaxTime=30 PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=node5 MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=8
PartitionName=urgent Nodes=node5 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=fragile Nodes=node[6-7] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=broken Nodes=node[8-9] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 "
    "RealMemory=64000 Gres=gpu:4 State=UNKNOWN"
)


def obstacle() -> str | None:
    """Why there can be no cluster here."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "only root can start the daemons of a SLURM"
    return None


@contextlib.contextmanager
def shared() -> Iterator[Cluster]:
    """The cluster, started unless it runs. Raises RuntimeError when it does not come up."""
    with USERS.open("w") as users, STARTING.open("w") as starting:
        fcntl.flock(users, fcntl.LOCK_SH)  # waits while a guard is stopping it
        fcntl.flock(starting, fcntl.LOCK_EX)
        cluster = Cluster()
        if not cluster.is_up():
            _start_guard()
            cluster.start()
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield cluster


def _start_guard() -> None:
    """From here on the cluster ends with its last user."""
    null = subprocess.DEVNULL
    subprocess.Popen([sys.executable, __file__, "guard"], stdin=null, stdout=null, stderr=null, start_new_session=True)


def guard() -> None:
    with USERS.open("w") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        Cluster().stop()


class Cluster:
    """Its daemons, and a hand on its nodes."""

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": f"{ROOT}/slurm.conf"}

    def ask(self, *command: str) -> str:
        """The output of a command of SLURM. Raises CalledProcessError."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, check=True, timeout=30)
        return done.stdout.strip()

    def jobs(self, form: str = "%i") -> list[str]:
        return self.ask("squeue", "-h", "-o", form).splitlines()

    def is_up(self) -> bool:
        return bool(_pid(ROOT / "slurmctld.pid"))

    def start(self) -> None:
        shutil.rmtree(ROOT, ignore_errors=True)  # of one that was killed
        self._configure()
        key, conf = ROOT / "munge.key", {"SLURM_CONF": f"{ROOT}/slurm.conf"}
        _run("munged", f"--key-file={key}", f"--socket={ROOT}/munge.socket", f"--pid-file={ROOT}/munged.pid",
             f"--log-file={ROOT}/munged.log", f"--seed-file={ROOT}/munged.seed", "--num-threads=2")  # fmt: skip
        _run("slurmctld", env=conf)
        for name in NODES:
            self.start_node(name)
        eventually(lambda: self._idle() == len(NODES), 60, lambda: self.ask("sinfo", "-N", "-l"))

    def _idle(self) -> int:
        try:
            return len(set(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").splitlines()))
        except subprocess.CalledProcessError:  # the controller does not listen yet
            return 0

    def _configure(self) -> None:
        for folder in ("state", "gpus", *(f"spool.{name}" for name in NODES)):
            (ROOT / folder).mkdir(parents=True)
        (ROOT / "munge.key").touch(mode=0o600)
        (ROOT / "munge.key").write_bytes(os.urandom(128))
        for number in range(4):  # as /dev/null is: SLURM sets no CUDA_VISIBLE_DEVICES for what is no device
            os.mknod(ROOT / f"gpus/nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        nodes = "\n".join(NODE.format(name=name, port=FIRST_NODE_PORT + i) for i, name in enumerate(NODES))
        (ROOT / "slurm.conf").write_text(SLURM_CONF.format(host=socket.gethostname(), nodes=nodes))
        (ROOT / "gres.conf").write_text(f"Name=gpu File={ROOT}/gpus/nvidia[0-3]\n")
        # slurmd loads a cgroup plugin whatever else is set, and ends where it finds none
        (ROOT / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = "".join(f"127.0.0.1 {name}\n" for name in NODES)
        (ROOT / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def start_node(self, name: str) -> None:
        """Its processes live and die with `unshare`; the shell inside is their init, which buries orphans."""
        inside = f"mount --bind {ROOT}/hosts /etc/hosts && hostname {name} && {{ slurmd -D -N {name} & wait; }}"
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with open(ROOT / "start.log", "ab") as log:
            process = subprocess.Popen(
                ["unshare", *namespaces, "sh", "-c", inside],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        (ROOT / f"{name}.unshare").write_text(str(process.pid))

    def kill_node(self, name: str) -> None:
        """All its processes at once, as when the power goes; and SLURM, which would notice by SlurmdTimeout, is told so."""
        os.kill(self._unshare(name), signal.SIGKILL)
        self.ask("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def revive_node(self, name: str) -> None:
        self.start_node(name)
        self.ask("scontrol", "update", f"nodename={name}", "state=resume")

    def kill_worker(self, run_dir: Path, rank: int) -> None:
        """SIGKILL to this rank of the newest replica of a run, wherever it is: we see the processes of all nodes."""
        newest = max((run_dir / "replicas").iterdir(), key=lambda path: path.stat().st_ctime).name
        (pid,) = _processes(f"-u -m batchinfer.worker {run_dir} --replica {newest} ", f"RANK={rank}")
        os.kill(pid, signal.SIGKILL)

    def _unshare(self, name: str) -> int:
        pid = _pid(ROOT / f"{name}.unshare")
        assert pid is not None, f"{name} is down"
        return pid

    @contextlib.contextmanager
    def hidden(self, name: str, folder: Path) -> Iterator[None]:
        """A node on which this folder is empty, as when a file system is not mounted there."""
        parent = self._unshare(name)
        (init,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        inside = ["nsenter", f"--target={init}", "--mount", "--pid"]  # umount looks at its own mounts through /proc
        _run(*inside, "mount", "-t", "tmpfs", "none", str(folder))
        try:
            yield
        finally:
            _run(*inside, "umount", "-l", str(folder))

    def stop(self) -> None:
        """Nothing of it is kept, so nothing has to end in order: its jobs, whoever they belong to, die with their nodes."""
        pids = [pid for path in (*ROOT.glob("*.unshare"), ROOT / "slurmctld.pid", ROOT / "munged.pid") if (pid := _pid(path))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(_lives, pids)), 10)
        shutil.rmtree(ROOT, ignore_errors=True)


def eventually(condition: Callable[[], object], seconds: float, explain: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to pass in {seconds} s: {explain()}"
        time.sleep(0.1)


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    """A daemon that goes into the background by itself, or a short command. Its output is shown only when it fails."""
    with open(ROOT / "start.log", "ab") as log:
        done = subprocess.run(command, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{(ROOT / 'start.log').read_text()[-2000:]}")


def _pid(path: Path) -> int | None:
    """The living process whose number stands in this file."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        pid = int(path.read_text())
        return pid if _lives(pid) else None
    return None


def _processes(words: str, variable: str) -> Iterator[int]:
    """Processes with these words in their command, and this entry in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            if words.encode() in command and variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


if __name__ == "__main__":
    if sys.argv[1:] == ["guard"]:
        guard()
    else:
        with shared() as cluster:
            print(f"export SLURM_CONF={ROOT}/slurm.conf\n{cluster.ask('sinfo')}\nEnter stops it")
            sys.stdin.readline()
