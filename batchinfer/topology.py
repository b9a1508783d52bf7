"""Facts about how the GPUs of this host reach each other, and what NCCL must be told because of it. Reads NVML; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from batchinfer import hardware

# The furthest part of a host that traffic over PCIe crosses, by NVML_TOPOLOGY_*, named as `nvidia-smi topo -m` does.
PCIE_PATHS = {0: "same board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
NVLINK = "NVLink"


@dataclass(frozen=True)
class Link:
    """Between the GPUs number `first` and `second` in CUDA's order under the mask.

    `path`: NVLink, or the way over PCIe. `peer`: each can map the other's memory; None where the driver does not say.
    """

    first: int
    second: int
    path: str
    peer: bool | None

    @property
    def name(self) -> str:
        return f"{self.path}{'' if self.peer or self.path == NVLINK else ', through host memory'}"


def visible_links(mask: str | None = None) -> list[Link]:
    """Between every two GPUs that CUDA would see under `mask` (default: CUDA_VISIBLE_DEVICES), as `hardware.visible_gpus`."""
    gpus = hardware.visible_gpus(mask)
    if len(gpus) < 2:
        return []
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [None if is_slice(gpu) else pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in gpus]
        return [_link(pynvml, i, j, handles[i], handles[j]) for i, j in combinations(range(len(gpus)), 2)]
    finally:
        pynvml.nvmlShutdown()


def is_slice(gpu: hardware.VisibleGPU) -> bool:
    return gpu.uuid.startswith("MIG-")


def _link(nvml: Any, i: int, j: int, first: Any | None, second: Any | None) -> Link:
    if first is None or second is None:  # a slice of a cut-up GPU maps nobody's memory (NVIDIA MIG User Guide)
        return Link(i, j, "MIG", False)
    if _status(nvml, first, second, nvml.NVML_P2P_CAPS_INDEX_NVLINK):
        return Link(i, j, NVLINK, True)
    try:
        path = PCIE_PATHS[nvml.nvmlDeviceGetTopologyCommonAncestor(first, second)]
    except nvml.NVMLError:  # virtual machines hide how their GPUs are plugged in
        path = "PCIe"
    return Link(i, j, path, _status(nvml, first, second, nvml.NVML_P2P_CAPS_INDEX_WRITE))


def _status(nvml: Any, first: Any, second: Any, capability: int) -> bool | None:
    try:
        return bool(nvml.nvmlDeviceGetP2PStatus(first, second, capability) == nvml.NVML_P2P_STATUS_OK)
    except nvml.NVMLError:
        return None


def interconnect(links: Sequence[Link]) -> str | None:
    """What `hw.interconnect` is: the slowest pair counts. None for a GPU alone."""
    if not links:
        return None
    return "nvlink" if all(link.path == NVLINK for link in links) else "pcie"


def nccl_environment(links: Sequence[Link]) -> dict[str, str]:
    """What `hw.env` needs for these links; the files in conf/hw have the reasons, and those for what is left alone.

    Peer-to-peer is switched off where no two GPUs have it: where some have, NCCL finds out by itself which.
    """
    if not links:
        return {}
    found = {"NCCL_DEBUG": "WARN"}
    if all(link.peer is False for link in links):
        found["NCCL_P2P_DISABLE"] = "1"
    if interconnect(links) == "nvlink":
        found["NCCL_NVLS_ENABLE"] = "0"
    return found


def matrix(links: Sequence[Link]) -> Iterator[str]:
    """Lines of a table of who reaches whom how."""
    size = 1 + max((link.second for link in links), default=-1)
    names = {(link.first, link.second): link.path for link in links}
    width = max((len(name) for name in names.values()), default=0)
    yield "  ".join([" " * 5, *(f"GPU {j}".ljust(width) for j in range(size))]).rstrip()
    for i in range(size):
        cells = ("-" if i == j else names[min(i, j), max(i, j)] for j in range(size))
        yield "  ".join([f"GPU {i}", *(cell.ljust(max(width, 5)) for cell in cells)]).rstrip()
