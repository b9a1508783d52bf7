"""Facts about machines: what GPUs are, which of them this process sees, how many cores and how much memory it may use.

Reads NVML, /proc and cgroups. No torch, no CUDA context: asking costs milliseconds and leaves the GPUs untouched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class GPU:
    """`memory_gib` is what CUDA can use, less than the label says; `tflops` is dense bfloat16 with float32 accumulation."""

    memory_gib: float
    bandwidth_gb_s: float
    tflops: float
    nvml_name: str  # as the driver calls it, to the letter: variants differ in memory and speed
    source: str


GPUS = {
    "rtx4090": GPU(23.5, 1008, 165.2, "NVIDIA GeForce RTX 4090", "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    "a100-80gb": GPU(79.1, 2039, 312, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB SXM datasheet"),
    "h100": GPU(79.1, 3350, 989, "NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM datasheet (half of the figure with sparsity)"),
    "h200": GPU(139.7, 4800, 989, "NVIDIA H200", "NVIDIA H200 SXM datasheet (half of the figure with sparsity)"),
}


@dataclass(frozen=True)
class VisibleGPU:
    """A GPU, or a MIG slice, of this host. `gpu`: its name in GPUS, or the driver's name where the table has none."""

    gpu: str
    memory_bytes: int
    uuid: str


def visible_gpus(mask: str | None = None) -> list[VisibleGPU]:
    """What CUDA would see under `mask` (default: CUDA_VISIBLE_DEVICES), in NVML's order. Empty where there is no driver.

    As in CUDA, the mask ends at its first entry that names no device.
    """
    import pynvml

    mask = os.environ.get("CUDA_VISIBLE_DEVICES") if mask is None else mask
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_describe(pynvml, handle) for handle in _handles(pynvml, mask)]
    finally:
        pynvml.nvmlShutdown()


def _handles(nvml: Any, mask: str | None) -> Iterator[Any]:
    whole = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if mask is None:
        yield from (_first_slice(nvml, handle) for handle in whole)
        return
    for entry in mask.split(","):
        handle = _handle(nvml, whole, entry.strip())
        if handle is None:
            return
        yield handle


def _handle(nvml: Any, whole: list[Any], entry: str) -> Any | None:
    if entry.isdecimal():
        return _first_slice(nvml, whole[int(entry)]) if int(entry) < len(whole) else None
    if entry.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(entry)
        except nvml.NVMLError:
            return None
    matches = [handle for handle in whole if entry.startswith("GPU-") and nvml.nvmlDeviceGetUUID(handle).startswith(entry)]
    return _first_slice(nvml, matches[0]) if len(matches) == 1 else None  # CUDA takes any unambiguous beginning


def _first_slice(nvml: Any, handle: Any) -> Any:
    """The GPU, or its first MIG slice when it is cut up: CUDA sees one slice of a GPU that is named as a whole."""
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return handle
    except nvml.NVMLError:  # most GPUs cannot be cut up
        return handle
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
        except nvml.NVMLError:  # no slice in this place
            continue
    return handle


def _describe(nvml: Any, handle: Any) -> VisibleGPU:
    name = nvml.nvmlDeviceGetName(handle)
    known = next((gpu for gpu, facts in GPUS.items() if facts.nvml_name == name), None)
    return VisibleGPU(known or name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total), nvml.nvmlDeviceGetUUID(handle))


def gpu_memory_bytes(gpu: str) -> int | None:
    """Bytes of one `gpu`: by the table, else by the driver of this host; None when neither knows it."""
    if gpu in GPUS:
        return int(GPUS[gpu].memory_gib * GIB)
    return min((seen.memory_bytes for seen in visible_gpus() if seen.gpu == gpu), default=None)


def usable_cores(root: Path = Path("/")) -> int:
    """CPU cores this process may use: its affinity, cut to the quota of its cgroups."""
    quotas = [quota for folder in _cgroup_folders(root, "cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *(int(quota) for quota in quotas)]))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory this process can still take: the kernel's estimate, cut to what its cgroups leave."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    left = [room for folder in _cgroup_folders(root, "memory") if (room := _memory_left(folder)) is not None]
    return max(0, min([available, *left]))


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup and its parents, for cgroup v2 and for `controller` of v1, as far as they are mounted here."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = mount / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(mount) and place.is_dir())


def _cpu_quota(folder: Path) -> float | None:
    if (text := _read(folder / "cpu.max")) is not None:
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us is not None and quota_us > 0 and period_us else None


def _memory_left(folder: Path) -> int | None:
    """Limit less use; file cache that the kernel would give up does not count as used."""
    for limit_name, use_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, use = _number(folder / limit_name), _number(folder / use_name)
        if limit is not None and use is not None:
            return limit - use + _field(folder / "memory.stat", cache_name)
    return None


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.strip() != "max" else None


def _field(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in (_read(path) or "").splitlines() if line.startswith(name + " ")), 0)
