"""Host memory does not grow with the rows: resident memory of every process of a long run, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.data.schema import num_rows
from batchinfer.job.manifest import Manifest
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from tests.run.jobs import processes_of, start

ROWS = 500_000
GROWTH_MIB = 16  # allowed between the first quarter and the end: 42 bytes a row

STUB = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Sample(NamedTuple):
    rows: int  # committed
    process: str
    mib: float  # resident


def role(command: str) -> str:
    for word, name in (
        ("batchinfer.worker", "torchrun" if "torch.distributed" in command else "worker"),
        ("submitit", "submitit job"),
    ):
        if word in command:
            return name
    return "launcher"


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resident_memory_is_flat_over_half_a_million_rows(tmp_path: Path) -> None:
    """MEMORY_PLOT=docs/memory.png also draws the curves."""
    table = pa.table(
        {
            "ids": pa.array([[3 + k % 500, 4, 5 + k % 7] for k in range(ROWS)], pa.list_(pa.int32())),
            "ballast": [f"{k:064d}" for k in range(ROWS)],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=ROWS)
    run_dir = tmp_path / "run"
    architecture = json.dumps(STUB).replace('"', "").replace(" ", "")
    job = start(
        "model=llama7b",
        "model.load_format=random",
        f"model.architecture={architecture}",
        "model.dtype=float32",
        "hw=cpu",
        "hw.cpus_per_gpu=1",
        "input=parquet",
        f"input.paths=[{tmp_path}/in.parquet]",
        "input.token_ids_column=ids",
        "sampling.max_tokens=2",
        "output.token_ids=true",
        "launcher=local",
        f"output.dir={run_dir}",
        log=tmp_path / "log",
    )
    samples = watch(job, run_dir)
    assert job.returncode == 0, (tmp_path / "log").read_text()
    assert verify(RunDir(run_dir)) == []
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    print(f"{summary['rows']:,} rows, {summary['rows_s']:,.0f} rows/s")
    if "MEMORY_PLOT" in os.environ:
        draw(samples, Path(os.environ["MEMORY_PLOT"]))
    for name in sorted({sample.process for sample in samples}):
        early = [s.mib for s in samples if s.process == name and 0.15 * ROWS <= s.rows <= 0.35 * ROWS]
        late = [s.mib for s in samples if s.process == name and 0.8 * ROWS <= s.rows < ROWS]
        print(f"{name}: {max(early):,.0f} MiB after a quarter of the rows, {max(late):,.0f} MiB at the end")
        assert max(late) < max(early) + GROWTH_MIB, f"{name} grew from {max(early):.0f} to {max(late):.0f} MiB"


def watch(job: subprocess.Popen[bytes], run_dir: Path) -> list[Sample]:
    """Resident memory of the processes while the run goes on, beside the rows committed by then. Of two alike, the larger."""
    readings: list[tuple[int, str, float]] = []
    while job.poll() is None:
        done = len(list((run_dir / "completions").glob("[0-9]*.parquet"))) if run_dir.exists() else 0
        largest: dict[str, float] = {}
        for pid, command in {job.pid: "launcher", **processes_of(run_dir)}.items():
            with contextlib.suppress(OSError):
                largest[role(command)] = max(resident_mib(pid), largest.get(role(command), 0))
        readings += [(done, process, mib) for process, mib in largest.items()]
        time.sleep(0.5)
    rows = [0, *accumulate(map(num_rows, Manifest.load(RunDir(run_dir)).units))]  # one replica commits in the order of units
    return [Sample(rows[done], process, mib) for done, process, mib in readings]


def draw(samples: list[Sample], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name in ("worker", "torchrun", "launcher", "submitit job"):
        curve = [sample for sample in samples if sample.process == name and sample.rows > 0]
        axes.plot([sample.rows for sample in curve], [sample.mib for sample in curve], label=name)
    axes.set(xlabel="rows committed", ylabel="resident memory, MiB", ylim=0, xlim=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    figure.legend(ncols=4, loc="outside upper center", frameon=False)
    figure.savefig(path)
