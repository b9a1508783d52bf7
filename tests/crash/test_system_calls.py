"""The same promise one level down: killed on entry to any system call of claim and commit that writes, Arrow's included."""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify

ROOT = Path(__file__).parents[2]
CALLS = "openat,write,pwrite64,fsync,link,linkat,unlink,unlinkat,rename,renameat2,mkdir"  # reading changes nothing
WORK = """
import sys
from pathlib import Path
from tests.crash.driver import Worker, create_run, here, manifest_module
manifest_module.git_commit = lambda: None
run_dir = create_run(Path(sys.argv[1]))
Worker(run_dir, here(sys.argv[2])).run()
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.skipif(not shutil.which("strace"), reason="no strace")]


def work(folder: Path, name: str, *strace: str) -> int:
    """Makes the run where there is none yet, and works on it to its end; the exit code, negative for a signal."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}
    tracer = ["strace", "-f", "-qq", *strace] if strace else []
    return subprocess.run([*tracer, sys.executable, "-c", WORK, str(folder), name], env=environment, check=False).returncode


def calls_on_the_run(folder: Path) -> list[tuple[str, int]]:
    """(system call, how manieth of its name) of every call from the first one on the run directory to the last on it."""
    log = folder / "strace.log"
    assert work(folder, "zeroth") == 0  # makes the input, and Python's cache files
    shutil.rmtree(folder / "run")
    assert work(folder, "counted", "-e", f"trace={CALLS}", "-y", "-o", str(log)) == 0
    parsed = [match for match in (re.match(r"(\d+) +(\w+)\(", line) for line in log.read_text().splitlines()) if match]
    lines = [line for line in log.read_text().splitlines() if re.match(r"\d+ +\w+\(", line)]
    main = parsed[0][1]
    touching = [i for i, line in enumerate(lines) if f"{folder}/run" in line]
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for i, match in enumerate(parsed):
        if match[1] == main:
            seen[match[2]] += 1
            if touching[0] <= i <= touching[-1]:
                found.append((match[2], seen[match[2]]))
    return found


def test_killed_on_entry_to_every_system_call_that_writes(tmp_path: Path) -> None:
    calls = calls_on_the_run(tmp_path)
    assert len(calls) > 90
    killed = 0
    for name, number in calls:
        shutil.rmtree(tmp_path / "run")
        injection = f"inject={name}:signal=SIGKILL:when={number}"
        killed += work(tmp_path, "first", "-e", f"trace={name}", "-e", injection, "-o", "/dev/null") != 0
        assert work(tmp_path, "second") == 0
        assert verify(RunDir(tmp_path / "run")) == [], f"after a kill on entry to {name} number {number}"
    assert killed > 0.9 * len(calls), f"only {killed} kills of {len(calls)}: the calls are not where they were counted"
    print(f"{killed} kills of {len(calls)} calls")
