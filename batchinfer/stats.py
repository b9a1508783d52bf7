"""Batch statistics: what one row of `stats/` says, and how a replica collects and publishes them.

A row is one engine step, or `stats_every` steps merged. Tokens and preemptions are summed in a merge, so that the tokens of
all rows add up to the tokens of the completions; levels (running, waiting) are those of the last step, the KV level is the
highest. Segments are numbered per replica and never rewritten. No torch here: the GPU is asked through NVML.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.engine.sequence import StepStats
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published, publish, temporary

MAX_BUFFERED_ROWS = 4096  # a segment is written at the latest after so many rows
SEGMENT = re.compile(r"(.+)-(\d{6,})\.parquet")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

STEP_SCHEMA = pa.schema(
    [
        pa.field("replica", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),  # the first of the merged steps
        pa.field("steps", pa.int32(), nullable=False),  # how many are merged
        pa.field("started", pa.float64(), nullable=False),  # seconds since the Unix epoch
        pa.field("duration_s", pa.float64(), nullable=False),  # sum over the steps, without the time between them
        pa.field("prefill_seqs", pa.int64(), nullable=False),
        pa.field("decode_seqs", pa.int64(), nullable=False),
        pa.field("prefill_tokens", pa.int64(), nullable=False),
        pa.field("decode_tokens", pa.int64(), nullable=False),
        pa.field("recomputed_tokens", pa.int64(), nullable=False),
        pa.field("prefix_hit_tokens", pa.int64(), nullable=False),
        pa.field("tokens_in_s", pa.float64()),
        pa.field("tokens_out_s", pa.float64()),
        *(pa.field(f"{what}_{q}_s", pa.float64()) for what in ("ttft", "inter_token") for q in QUANTILES),
        pa.field("running", pa.int32(), nullable=False),
        pa.field("waiting", pa.int32(), nullable=False),
        pa.field("preempted", pa.int64(), nullable=False),
        pa.field("kv_blocks_used", pa.int32(), nullable=False),
        pa.field("kv_blocks_total", pa.int32(), nullable=False),
        pa.field("graph", pa.float64(), nullable=False),  # share of the steps that replayed a captured graph
        pa.field("gpu_memory_bytes", pa.int64()),
        pa.field("gpu_power_w", pa.float64()),
        pa.field("gpu_utilization", pa.float64()),
    ]
)


def percentile(ordered: Sequence[float], q: float) -> float | None:
    """The q-quantile (0 to 1) of sorted values with linear interpolation; None of nothing."""
    if not ordered:
        return None
    position = q * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class GpuSample:
    """What NVML said last. Memory: the fullest device; power: the sum; utilisation: the mean, 0 to 1. None: not told."""

    memory_bytes: int | None = None
    power_w: float | None = None
    utilization: float | None = None


class Sampler(Protocol):
    @property
    def latest(self) -> GpuSample: ...


class StepRecorder:
    """Turns `StepStats` into numbered Parquet segments of `stats/`. `record` and `flush` may come from two threads."""

    def __init__(self, run_dir: RunDir, replica: str, every: int = 1, gpu_sampler: Sampler | None = None) -> None:
        self._run_dir, self._replica, self._every, self._gpu = run_dir, replica, every, gpu_sampler
        self._group: list[StepStats] = []
        self._rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        numbers = [number for name, number in segments(run_dir) if name == replica]
        self._next = max(numbers, default=-1) + 1

    def record(self, stats: StepStats) -> None:
        """Take one step. Writes a segment when MAX_BUFFERED_ROWS rows have gathered."""
        with self._lock:
            self._group.append(stats)
            if len(self._group) >= self._every:
                self._close_group()
            full = len(self._rows) >= MAX_BUFFERED_ROWS
        if full:
            self.flush()

    def flush(self) -> None:
        """Publish everything recorded so far, an unfinished merge included. Raises OSError, and keeps the rows then."""
        with self._write_lock:
            with self._lock:
                self._close_group()
                rows = list(self._rows)
            if rows:
                self._publish(pa.Table.from_pylist(rows, schema=STEP_SCHEMA))
            with self._lock:
                del self._rows[: len(rows)]

    def _close_group(self) -> None:
        if self._group:
            sample = self._gpu.latest if self._gpu else GpuSample()
            self._rows.append(_merge(self._replica, self._group, sample))
            self._group = []

    def _publish(self, table: pa.Table) -> None:
        outcome = Published.LOST
        while outcome is Published.LOST:
            final = self._run_dir.stats / f"{self._replica}-{self._next:06d}.parquet"
            tmp = temporary(final)
            try:
                pq.write_table(table, tmp, compression="zstd")
                outcome = publish(tmp, final)
            finally:
                tmp.unlink(missing_ok=True)
            self._next += 1


def segments(run_dir: RunDir) -> list[tuple[str, int]]:
    """(replica, number) of every segment in `stats/`, sorted."""
    matches = (SEGMENT.fullmatch(name) for name in os.listdir(run_dir.stats) if not name.startswith("."))
    return sorted((match[1], int(match[2])) for match in matches if match)


def _merge(replica: str, group: Sequence[StepStats], gpu: GpuSample) -> dict[str, Any]:
    first, last = group[0], group[-1]
    summed = (
        "duration_s",
        "prefill_seqs",
        "decode_seqs",
        "prefill_tokens",
        "decode_tokens",
        "recomputed_tokens",
        "prefix_hit_tokens",
        "preempted",
    )
    row: dict[str, Any] = {name: sum(getattr(stats, name) for stats in group) for name in summed}
    seconds = row["duration_s"]
    return (
        row
        | _latencies(group)
        | {
            "replica": replica,
            "step": first.step,
            "steps": len(group),
            "started": first.started,
            "tokens_in_s": row["prefill_tokens"] / seconds if seconds else None,
            "tokens_out_s": row["decode_tokens"] / seconds if seconds else None,
            "running": last.running,
            "waiting": last.waiting,
            "kv_blocks_used": max(stats.kv_blocks_used for stats in group),
            "kv_blocks_total": last.kv_blocks_total,
            "graph": sum(stats.graph for stats in group) / len(group),
            "gpu_memory_bytes": gpu.memory_bytes,
            "gpu_power_w": gpu.power_w,
            "gpu_utilization": gpu.utilization,
        }
    )


def _latencies(group: Sequence[StepStats]) -> dict[str, float | None]:
    ttft = sorted(chain.from_iterable(stats.ttft_s for stats in group))
    inter_token = sorted(chain.from_iterable(stats.inter_token_s for stats in group))
    both = {"ttft": ttft, "inter_token": inter_token}
    return {f"{what}_{name}_s": percentile(values, q) for what, values in both.items() for name, q in QUANTILES.items()}


class GpuSampler:
    """Asks NVML about this process's devices in a background thread, at most once a second.

    `start` returns None where there is no driver or no device. What a device does not tell (a MIG slice has no power of
    its own) is None in the samples.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any], interval_s: float = 1.0) -> None:
        self._nvml, self._handles, self._interval_s = nvml, handles, max(1.0, interval_s)
        self._stopped = threading.Event()
        self.latest = GpuSample()
        self._thread = threading.Thread(target=self._loop, name="gpu-sampler", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, visible_devices: str | None = None) -> GpuSampler | None:
        """`visible_devices`: as CUDA_VISIBLE_DEVICES has it (default: from the environment): indices, GPU- or MIG- UUIDs."""
        import pynvml

        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible_devices is None else visible_devices
        try:
            pynvml.nvmlInit()
            handles = _handles(pynvml, visible)
        except pynvml.NVMLError:
            return None
        return cls(pynvml, handles) if handles else None

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            self.latest = self._sample()
            if self._stopped.wait(self._interval_s):
                return

    def _sample(self) -> GpuSample:
        nvml = self._nvml
        memory = self._ask(lambda h: nvml.nvmlDeviceGetMemoryInfo(h).used)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage)
        percent = self._ask(lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu)
        return GpuSample(
            memory_bytes=int(max(memory)) if memory else None,
            power_w=sum(milliwatts) / 1000 if milliwatts else None,
            utilization=sum(percent) / len(percent) / 100 if percent else None,
        )

    def _ask(self, question: Any) -> list[float]:
        answers: list[float] = []
        for handle in self._handles:
            with contextlib.suppress(self._nvml.NVMLError):  # not supported by this device
                answers.append(question(handle))
        return answers


def _handles(nvml: Any, visible: str | None) -> list[Any]:
    """NVML indices follow the PCI bus, as CUDA's do under CUDA_DEVICE_ORDER=PCI_BUS_ID (which the launcher sets)."""
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    by_index, by_uuid = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
    return [by_index(int(name)) if name.isdecimal() else by_uuid(name) for name in names]
