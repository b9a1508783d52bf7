"""A driver of straw: as much of NVML as is asked for, for hosts that the tests make up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from batchinfer.hardware import GIB


class Driver:
    """GPUs are dicts, MIG slices lie inside them. `nvlink`, `peers`: pairs of GPUs by UUID that have it; `silent`: the driver
    does not say what there is between GPUs. Numbers are those of nvml.h."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVML_P2P_CAPS_INDEX_WRITE, NVML_P2P_CAPS_INDEX_NVLINK = 1, 2
    NVML_P2P_STATUS_OK, NVML_P2P_STATUS_NOT_SUPPORTED = 0, 5

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: dict[str, Any]) -> None:
        self.gpus, self.open = gpus, 0
        self.nvlink: set[frozenset[str]] = set()
        self.peers: set[frozenset[str]] = set()
        self.silent = False

    def nvmlInit(self) -> None:
        if not self.gpus:
            raise self.NVMLError
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        found = [device for gpu in self.gpus for device in (gpu, *gpu.get("slices", ())) if device["uuid"] == uuid]
        if not found:
            raise self.NVMLError
        return found[0]

    def nvmlDeviceGetUUID(self, device: dict[str, Any]) -> str:
        return str(device["uuid"])

    def nvmlDeviceGetName(self, device: dict[str, Any]) -> str:
        return str(device["name"])

    def nvmlDeviceGetMemoryInfo(self, device: dict[str, Any]) -> Any:
        return SimpleNamespace(total=device["gib"] * GIB)

    def nvmlDeviceGetMigMode(self, device: dict[str, Any]) -> list[int]:
        if "slices" not in device:
            raise self.NVMLError
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: dict[str, Any], index: int) -> dict[str, Any]:
        if index >= len(device["slices"]):
            raise self.NVMLError
        slices: list[dict[str, Any]] = device["slices"]
        return slices[index]

    def nvmlDeviceGetP2PStatus(self, first: dict[str, Any], second: dict[str, Any], capability: int) -> int:
        assert first in self.gpus and second in self.gpus and first != second, "NVML answers for two whole GPUs only"
        if self.silent:
            raise self.NVMLError
        pairs = {self.NVML_P2P_CAPS_INDEX_NVLINK: self.nvlink, self.NVML_P2P_CAPS_INDEX_WRITE: self.nvlink | self.peers}
        has_it = frozenset((first["uuid"], second["uuid"])) in pairs[capability]
        return self.NVML_P2P_STATUS_OK if has_it else self.NVML_P2P_STATUS_NOT_SUPPORTED

    def nvmlDeviceGetTopologyCommonAncestor(self, first: dict[str, Any], second: dict[str, Any]) -> int:
        if self.silent:
            raise self.NVMLError
        return 10 if first.get("switch") is not None and first.get("switch") == second.get("switch") else 50
