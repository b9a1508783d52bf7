"""What a replica ran on and with: `replicas/<name>/environment.json`, there before its first commit.

The rows of a run name their replica, so this is where their GPUs, drivers, versions and node can be looked up for ever.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from batchinfer import hardware
from batchinfer.config import Config
from batchinfer.job.manifest import git_commit, versions
from batchinfer.job.rundir import RunDir
from batchinfer.ops.compiled import PATH
from batchinfer.publish import replace_bytes

SLURM = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST", "NODEID", "JOB_PARTITION", "CLUSTER_NAME")


def write_environment(run_dir: RunDir, replica: str, config: Config) -> None:
    """One file for each node of the replica: `environment.json`, and `environment-1.json` for a second one."""
    node = os.environ.get("GROUP_RANK", "0")
    path = run_dir.environment(replica).with_stem("environment" if node == "0" else f"environment-{node}")
    replace_bytes(path, json.dumps(environment(config), indent=1).encode(), durable=True)


def environment(config: Config) -> dict[str, Any]:
    """Facts about this process's host, devices and programs; None for what is not there."""
    has_gpu = config.hw.gpu is not None
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": hardware.usable_cores(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "gpus": [vars(gpu) for gpu in hardware.visible_gpus()] if has_gpu else [],
        "driver": hardware.driver_version() if has_gpu else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_gpu and torch.cuda.is_available() else None,
        "kernels": hashlib.sha256(PATH.read_bytes()).hexdigest() if has_gpu and PATH.exists() else None,
        "versions": versions() | {"torch": torch.__version__},
        "git_commit": git_commit(),
        "package": str(Path(__file__).parents[1]),
        "slurm": {name: os.environ[f"SLURM_{name}"] for name in SLURM if f"SLURM_{name}" in os.environ},
    }
