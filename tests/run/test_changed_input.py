"""Input that changes between plan and work: a clear sentence that names the file, nothing committed of it, and no second plan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.compose import compose
from batchinfer.job.plan import freeze, make_plan
from batchinfer.job.replica import HOPELESS
from tests.run.jobs import ROOT, batchinfer, completions, environment

REQUEST = [
    "hw=cpu",
    "hw.cpus_per_gpu=1",
    "launcher=inline",
    "input=parquet",
    "input.prompt_column=prompt",
    "input.rows_per_unit=8",
    "sampling.max_tokens=2",
]


def write(path: Path, rows: int, word: str = "word") -> None:
    pq.write_table(pa.table({"prompt": [f"{word} {k:04d}" for k in range(rows)]}), path)


def replace_with_the_same_size(path: Path) -> None:
    before = path.stat()
    write(path, 16, "wore")
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(path.read_bytes())


CHANGES: dict[str, Callable[[Path], None]] = {
    "replaced": replace_with_the_same_size,
    "longer": lambda path: write(path, 24),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "appended to": append,
    "removed": Path.unlink,
}


@pytest.mark.parametrize(
    ("shard", "change"), [("a", "truncated"), ("b", "replaced"), ("b", "longer"), ("b", "appended to"), ("b", "removed")]
)
def test_a_changed_shard_ends_the_job_with_its_name(tmp_path: Path, shard: str, change: str) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    write(inputs / "a.parquet", 16)
    write(inputs / "b.parquet", 16)
    request = [*REQUEST, f"input.paths=['{inputs}']", f"output.dir={tmp_path}/run"]
    freeze(make_plan(compose(request)))
    file = inputs / f"{shard}.parquet"
    CHANGES[change](file)

    work = subprocess.run(
        [sys.executable, "-m", "batchinfer.worker", str(tmp_path / "run")],
        env=environment(),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert work.returncode == HOPELESS, work.stderr
    last = work.stderr.strip().splitlines()[-1]
    assert str(file) in last and "planned" in last, work.stderr
    if list((tmp_path / "run" / "completions").glob("0*.parquet")):
        assert {row["shard"] for row in completions(tmp_path / "run").to_pylist()} == {"a.parquet"}

    assert batchinfer("resume", tmp_path / "run").returncode == 2
    again = batchinfer(*request)
    assert again.returncode == 2, again.stdout + again.stderr
    assert ("input.shards" in again.stderr) or (change in ("truncated", "appended to") and str(file) in again.stderr), (
        again.stderr
    )
    assert len(again.stderr.strip().splitlines()) == 1
