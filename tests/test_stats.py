"""Step statistics: merging, segments, percentiles, and the sampler against a driver that is not there."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer import stats
from batchinfer.engine.sequence import StepStats
from batchinfer.job.rundir import RunDir
from batchinfer.stats import STEP_SCHEMA, GpuSample, GpuSampler, StepRecorder, percentile


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path)
    found.create()
    return found


def step(number: int, **values: Any) -> StepStats:
    return StepStats(step=number, started=100.0 + number, **{"duration_s": 0.5, **values})


def written(run_dir: RunDir) -> pa.Table:
    names = [f"{replica}-{number:06d}.parquet" for replica, number in stats.segments(run_dir)]
    return pa.concat_tables([pq.read_table(run_dir.stats / name) for name in names])


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_tokens_add_up_however_steps_are_merged(run_dir: RunDir, every: int) -> None:
    draw = random.Random(0)
    steps = [step(i, prefill_tokens=draw.randrange(99), decode_tokens=draw.randrange(99), preempted=i % 2) for i in range(100)]
    recorder = StepRecorder(run_dir, "01-0-0", every)
    for number, one in enumerate(steps):
        recorder.record(one)
        if number == 40:
            recorder.flush()
    recorder.flush()
    table = written(run_dir)
    assert table.schema.equals(STEP_SCHEMA)
    for name in ("prefill_tokens", "decode_tokens", "preempted", "duration_s"):
        assert sum(table[name].to_pylist()) == sum(getattr(one, name) for one in steps)
    assert sum(table["steps"].to_pylist()) == 100


def test_a_merged_row(run_dir: RunDir) -> None:
    recorder = StepRecorder(run_dir, "r", 2, SimpleNamespace(latest=GpuSample(memory_bytes=7, power_w=1.5)))
    recorder.record(step(4, prefill_tokens=6, kv_blocks_used=9, running=3, graph=True, ttft_s=[1.0], inter_token_s=[0.1, 0.3]))
    recorder.record(step(5, decode_tokens=3, kv_blocks_used=2, running=1, ttft_s=[2.0]))
    recorder.flush()
    (row,) = written(run_dir).to_pylist()
    assert (row["step"], row["steps"], row["started"], row["duration_s"]) == (4, 2, 104.0, 1.0)
    assert (row["tokens_in_s"], row["tokens_out_s"], row["running"], row["kv_blocks_used"], row["graph"]) == (6.0, 3.0, 1, 9, 0.5)
    assert (row["ttft_p50_s"], row["inter_token_p50_s"]) == (1.5, pytest.approx(0.2))
    assert (row["gpu_memory_bytes"], row["gpu_power_w"], row["gpu_utilization"]) == (7, 1.5, None)


def test_segments_are_never_rewritten(run_dir: RunDir) -> None:
    for _ in range(2):  # the second recorder goes on behind the first
        recorder = StepRecorder(run_dir, "01-0-0")
        recorder.flush()  # nothing recorded: no file
        for number in range(2):
            recorder.record(step(number))
            recorder.flush()
    StepRecorder(run_dir, "01-0-0.1").flush()
    (run_dir.stats / "01-0-0-000004.parquet").write_bytes(b"somebody else's")
    late = recorder
    late.record(step(9))
    late.flush()
    assert sorted(p.name for p in run_dir.stats.iterdir()) == [f"01-0-0-{n:06d}.parquet" for n in range(6)]
    assert (run_dir.stats / "01-0-0-000004.parquet").read_bytes() == b"somebody else's"


def test_buffer_is_bounded(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MAX_BUFFERED_ROWS", 10)
    recorder = StepRecorder(run_dir, "r")
    for number in range(25):
        recorder.record(step(number))
    assert written(run_dir).num_rows == 20


def test_flush_beside_record_loses_nothing(run_dir: RunDir) -> None:
    recorder, ended = StepRecorder(run_dir, "r"), threading.Event()

    def flush_all_the_time() -> None:
        while not ended.is_set():
            recorder.flush()

    thread = threading.Thread(target=flush_all_the_time)
    thread.start()
    for number in range(2000):
        recorder.record(step(number))
    ended.set()
    thread.join()
    recorder.flush()
    assert written(run_dir)["step"].to_pylist() == list(range(2000))


def test_percentile_is_numpys() -> None:
    draw = random.Random(1)
    for size in range(1, 30):
        values = sorted(draw.random() for _ in range(size))
        for q in (0.0, 0.5, 0.9, 0.99, 1.0):
            assert percentile(values, q) == pytest.approx(np.quantile(values, q))
    assert percentile([], 0.5) is None


class FakeNvml:
    """Two devices of which the second, a MIG slice, does not tell its power."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used={"0": 10, "MIG-a": 20}[handle])

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if handle == "MIG-a":
            raise self.NVMLError
        return 250_000

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        raise self.NVMLError

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return str(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetCount(self) -> int:
        return 2


def test_sampler_takes_what_the_devices_tell() -> None:
    nvml = FakeNvml()
    assert stats._handles(nvml, "0, MIG-a") == ["0", "MIG-a"]
    assert stats._handles(nvml, None) == ["0", "1"]
    assert stats._handles(nvml, "") == []
    sampler = GpuSampler(nvml, ["0", "MIG-a"])
    sampler.stop()
    assert sampler.latest == GpuSample(memory_bytes=20, power_w=250.0, utilization=None)


def test_sampler_without_devices() -> None:
    assert GpuSampler.start("") is None
