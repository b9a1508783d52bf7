"""Running the real command line in child processes, and reading what it left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
Key = tuple[str, int, int]  # shard, row, sample


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def batchinfer(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`python -m batchinfer ...` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "batchinfer", *map(str, arguments)],
        env=environment(),
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
    )


def start(*arguments: object, log: Path) -> subprocess.Popen[bytes]:
    """The same in the background, in a session of its own; its output is appended to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "batchinfer", *map(str, arguments)],
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def processes_of(run_dir: Path) -> dict[int, str]:
    """Every live process that names the run directory in its command line: pid -> command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(run_dir) in command and state != "Z":
            found[int(folder.name)] = command
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(run_dir: Path, seconds: float) -> dict[int, str]:
    """What is still alive of a run after at most so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def completions(run_dir: Path) -> pa.Table:
    """All committed rows, in the order of the units. These tests never leave two generations of a unit."""
    files = sorted((run_dir / "completions").glob("[0-9]*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in files])


def rows(run_dir: Path) -> list[tuple[Key, tuple[object, ...]]]:
    """Of every committed row its key, and what must not depend on how the run went."""
    table = completions(run_dir)
    columns = ["shard", "row", "sample", "completion", "token_ids", "finish_reason", "error", "num_prompt_tokens"]
    found = table.select([name for name in columns if name in table.column_names]).to_pylist()
    return [((row["shard"], row["row"], row["sample"]), tuple(map(repr, row.values()))) for row in found]


def texts(run_dir: Path) -> dict[Key, tuple[object, ...]]:
    """The same by key. Fails on a row that is there twice."""
    found = rows(run_dir)
    result = dict(found)
    assert len(result) == len(found), "a row was committed twice"
    return result
