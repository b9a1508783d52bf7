"""Host memory does not grow with the rows: resident memory of every process of a long run, watched from outside."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.run.jobs import batchinfer, processes_of, start

STUB = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def role(command: str) -> str:
    for word, name in (("batchinfer.worker", "torchrun" if "torch.distributed" in command else "worker"), ("submitit", "submitit job")):
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
def test_resident_memory_is_flat_over_a_hundred_thousand_rows(tmp_path: Path) -> None:
    rows = 100_000
    table = pa.table({"ids": pa.array([[3 + k % 500, 4, 5 + k % 7] for k in range(rows)], pa.list_(pa.int32())),
                      "ballast": [f"{k:064d}" for k in range(rows)]})  # fmt: skip
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=rows)
    run_dir = tmp_path / "run"
    architecture = json.dumps(STUB).replace('"', "").replace(" ", "")
    job = start("model=llama7b", "model.load_format=random", f"model.architecture={architecture}", "model.dtype=float32", "hw=cpu",
                "input=parquet", f"input.paths=[{tmp_path}/in.parquet]", "input.token_ids_column=ids", "sampling.max_tokens=2",
                "output.token_ids=true", "launcher=local", f"output.dir={run_dir}", log=tmp_path / "log")  # fmt: skip
    samples: list[tuple[float, str, float, int]] = []
    began = time.monotonic()
    while job.poll() is None:
        done = len(list((run_dir / "completions").glob("[0-9]*.parquet"))) if run_dir.exists() else 0
        for pid, command in {job.pid: "launcher", **processes_of(run_dir)}.items():
            try:
                samples.append((round(time.monotonic() - began, 1), role(command), resident_mib(pid), done))
            except OSError:
                continue
        time.sleep(1)
    assert job.returncode == 0, (tmp_path / "log").read_text()
    with (tmp_path / "memory.csv").open("w") as out:
        csv.writer(out).writerows([("seconds", "process", "resident_mib", "units_done"), *samples])
    print(f"memory curve: {tmp_path / 'memory.csv'}, {time.monotonic() - began:.0f} s")
    units = max(done for *_, done in samples)
    for name in ("worker", "launcher"):
        early = [mib for _, process, mib, done in samples if process == name and 0.15 * units <= done <= 0.35 * units]
        late = [mib for _, process, mib, done in samples if process == name and done >= 0.8 * units]
        assert max(late) < max(early) * 1.1 + 32, f"{name} grew from {max(early):.0f} to {max(late):.0f} MiB"
    assert batchinfer("verify", run_dir).returncode == 0
