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
    """`memory_gib` is what CUDA can use, less than the label says; `tflops` is dense bfloat16 with float32 accumulation.

    `read_gb_s` and `gemm_tflops` are what a program reaches: on H100 and H200 measured (docs/performance.md, csrc/README.md), on
    the others the same shares of the label (0.89 and 0.78) unless the source says more.
    """

    memory_gib: float
    bandwidth_gb_s: float
    tflops: float
    read_gb_s: float
    gemm_tflops: float
    nvlink: str | None  # its name in LINKS
    nvml_name: str  # as the driver calls it, to the letter: variants differ in memory and speed
    source: str


GPUS = {
    "rtx4090": GPU(
        memory_gib=23.5,
        bandwidth_gb_s=1008,
        tflops=165.2,
        read_gb_s=897,
        gemm_tflops=158,  # the issue below, products of 8,192 in float16
        nvlink=None,
        nvml_name="NVIDIA GeForce RTX 4090",
        source="NVIDIA Ada GPU architecture whitepaper, appendix A; github.com/mli/transformers-benchmarks, issue 4",
    ),
    "a100-80gb": GPU(
        memory_gib=79.1,
        bandwidth_gb_s=2039,
        tflops=312,
        read_gb_s=1815,
        gemm_tflops=243,
        nvlink="nvlink3",
        nvml_name="NVIDIA A100-SXM4-80GB",
        source="NVIDIA A100 80GB SXM datasheet",
    ),
    "h100": GPU(
        memory_gib=79.1,
        bandwidth_gb_s=3350,
        tflops=989,
        read_gb_s=3080,
        gemm_tflops=789,
        nvlink="nvlink4",
        nvml_name="NVIDIA H100 80GB HBM3",
        source="NVIDIA H100 SXM datasheet (half of the figure with sparsity)",
    ),
    "h200": GPU(
        memory_gib=139.7,
        bandwidth_gb_s=4800,
        tflops=989,
        read_gb_s=4260,
        gemm_tflops=763,
        nvlink="nvlink4",
        nvml_name="NVIDIA H200",
        source="NVIDIA H200 SXM datasheet (half of the figure with sparsity)",
    ),
}


@dataclass(frozen=True)
class Link:
    """What joins the GPUs of a node. Bandwidths are of one GPU in one direction; `latency_us` is that of an all-reduce of a few
    KB between two of them inside a CUDA graph, `hop_us` what each further one adds."""

    bandwidth_gb_s: float
    reached_gb_s: float
    latency_us: float
    hop_us: float
    source: str


LINKS = {
    "nvlink4": Link(
        bandwidth_gb_s=450,
        reached_gb_s=345,
        latency_us=3.7,
        hop_us=0.5,
        source="18 links of 25 GB/s (H100 datasheet). Our kernel between two and four H200, with the norm in it: 3.6 and 4.6 us "
        "at 10 KB, 122 and 185 us at 42 MB (docs/performance.md)",
    ),
    "nvlink3": Link(
        bandwidth_gb_s=300,
        reached_gb_s=230,
        latency_us=3.9,
        hop_us=0.5,
        source="12 links of 25 GB/s (A100 datasheet), of which the share that NVLink 4 reaches. NCCL takes 10.1 us between two "
        "A100 (github.com/NVIDIA/nccl, issue 583), and 9.7 us on NVLink 4, where our kernel takes 3.6",
    ),
    "pcie4": Link(
        bandwidth_gb_s=31.5,
        reached_gb_s=12,
        latency_us=15,
        hop_us=4.5,
        source="16 GT/s x 16 lanes x 128/130 bits, through host memory, as GeForce boards have no peer-to-peer. NCCL counts on "
        "24 GB/s (github.com/NVIDIA/nccl-tests, issue 307), here halved for traffic both ways. A word between two RTX 2080 Ti "
        "takes 12 to 18 us (issue 117 there), an all-reduce among eight RTX 4090 42 us (github.com/NVIDIA/nccl, issue 1530)",
    ),
}


def link_of(gpu: str, interconnect: str | None) -> Link:
    """What joins several `gpu` of a node whose tier says nvlink, pcie or nothing: boards that have NVLink come with it."""
    nvlink = GPUS[gpu].nvlink
    return LINKS[nvlink] if nvlink is not None and interconnect != "pcie" else LINKS["pcie4"]


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


def driver_version() -> str | None:
    """Of the NVIDIA driver; None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
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
