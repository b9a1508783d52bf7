"""Under which conditions figures came about: what must stand beside every one of them. No torch."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from batchinfer import hardware
from batchinfer.config import Config
from batchinfer.job.manifest import git_commit, versions
from batchinfer.model.config import load_shape

PACKAGES = ("batchinfer", "torch", "python")


def conditions(config: Config, words: Sequence[str]) -> dict[str, Any]:
    """Of a bench with these words on its command line. `config` has hardware and dtype as facts."""
    shape, known = load_shape(config.model), versions()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "batchinfer", "bench", *words]),
        "commit": git_commit(),
        **{name: known[name] for name in PACKAGES},
        "device": describe_device(config),
        "gpus": int(config.hw.tensor_parallel) if config.hw.gpu else 0,
        "architecture": shape.architecture,
        "parameters": shape.num_parameters(),
        "weights": config.model.path if config.model.load_format == "safetensors" else "random",
        "dtype": config.model.dtype,
        "sampling": "greedy, ignore_eos",
        "engine": asdict(config.engine),
    }


def describe_device(config: Config) -> dict[str, Any]:
    """The GPU in the driver's words, or the CPU."""
    if config.hw.gpu is None:
        return {"name": _cpu_name(), "cores": hardware.usable_cores()}
    import pynvml

    uuid = hardware.visible_gpus()[0].uuid
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return {
            "name": pynvml.nvmlDeviceGetName(handle),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / hardware.GIB, 1),
            "power_limit_w": _told(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            "sm_clock_mhz": _told(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        }
    finally:
        pynvml.nvmlShutdown()


def _told(ask: Any) -> Any:
    """None where the driver does not say: MIG slices and virtual GPUs keep some things to themselves."""
    import pynvml

    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if named:
            return named[0]
    return platform.machine()
