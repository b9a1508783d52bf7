"""The verb `bench`: checks what is asked, starts each side in a process of its own, and shows what they say.

One after the other on the same GPU: the ceilings, our engine, the peers. So no side finds memory taken or a library warm by
another, and one that dies is a line in the table. Imports no torch itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import batchinfer
from batchinfer import hardware
from batchinfer.bench.conditions import conditions
from batchinfer.bench.results import CEILINGS, OURS, collect
from batchinfer.bench.table import show as show_found
from batchinfer.bench.task import Task
from batchinfer.config import Config, ConfigError, HardwareConfig, show
from batchinfer.job.plan import resolved
from batchinfer.job.process import MARK, command_of_child, kill_marked
from batchinfer.job.replica import last_words, torchrun
from batchinfer.model.config import ARCHITECTURES, load_shape

MODULES = {CEILINGS: "batchinfer.bench.ceilings", OURS: "batchinfer.bench.ours"}
PEER_MODULES = {"hf": "batchinfer.bench.hf", "vllm": "batchinfer.bench.vllm"}
NEEDS = {"hf": "transformers", "vllm": "vllm"}  # what must be importable
DOING = {CEILINGS: "measuring what the device reaches", OURS: "running our engine"}
PEER_TIMEOUT_S = 3600.0
INTERRUPTED = "interrupted"
TAIL_CHARACTERS = 65536


def bench(config: Config, words: Sequence[str]) -> int:
    """Measures and shows. `words`: the overrides as they were given. Returns 0 when our engine ran every workload, else 1.

    ConfigError: the model does not fit, there is no such GPU, a request cannot be run, or a peer is not installed.
    """
    config = resolved(config)
    _check_device(config.hw)
    peers = chosen_peers(config)
    folder, kept = Path(tempfile.mkdtemp(prefix="batchinfer-bench-")), False
    try:
        task = Task(folder, config, _checkpoint(config, folder))
        workloads = task.workloads()
        task.save()
        where = conditions(config, words)
        failures = _run_all(task, peers)
        found = collect(task, workloads, peers, failures, where)
        show_found(found)
        kept = any(task.log_file(side).exists() for side in failures)
        if INTERRUPTED in failures.values():
            raise KeyboardInterrupt
        return 0 if all(workload[OURS] for workload in found["workloads"].values()) else 1
    finally:
        if kept:
            print(f"batchinfer: logs of what failed: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _run_all(task: Task, peers: Sequence[str]) -> dict[str, str]:
    """Every side in turn; why those failed that did. Ctrl-C and SIGTERM end it there: what was measured until then stays."""
    failures: dict[str, str] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for side in (CEILINGS, OURS, *peers):
            why = _unable(side, task.config) or _run(task, side)
            if why is not None:
                failures[side] = why
    except KeyboardInterrupt:
        failures[side] = INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return failures


def _check_device(hw: HardwareConfig) -> None:
    if hw.gpu is None:
        return
    seen = hardware.visible_gpus()
    if len(seen) < int(hw.tensor_parallel):
        raise ConfigError(
            f"{show('hw.gpu', hw.gpu)}: needs {hw.tensor_parallel} GPU{'s' if int(hw.tensor_parallel) > 1 else ''} and this host "
            f"has {len(seen)}; run it on such a node, or choose hw=cpu"
        )
    if seen[0].gpu != hw.gpu:
        print(f"batchinfer: hw.gpu={hw.gpu}, but this host has {seen[0].gpu}: figures are of the latter", file=sys.stderr)


def chosen_peers(config: Config) -> list[str]:
    """Those that are asked for, else those that are installed. ConfigError: one that is asked for is not."""
    installed = [peer for peer, package in NEEDS.items() if importlib.util.find_spec(package) is not None]
    if config.bench.peers is None:
        return installed
    for peer in config.bench.peers:
        if peer not in installed:
            has = ", ".join(installed) or "none"
            raise ConfigError(
                f"{show('bench.peers', config.bench.peers)}: {NEEDS[peer]} is not installed here; peers that are: {has}"
            )
    return list(dict.fromkeys(config.bench.peers))


def _checkpoint(config: Config, folder: Path) -> str:
    """The checkpoint's folder, or one that holds only a config.json of model.architecture, for peers with random weights."""
    if config.model.path is not None:
        return config.model.path
    made = folder / "checkpoint"
    made.mkdir()
    name = load_shape(config.model).architecture
    fields = {**config.model.architecture, "architectures": [name], "model_type": ARCHITECTURES[name].model_type}
    (made / "config.json").write_text(json.dumps(fields))
    return str(made)


def _unable(side: str, config: Config) -> str | None:
    if side == "hf" and int(config.hw.tensor_parallel) > 1:
        return f"it runs on one GPU here, not with {show('hw.tensor_parallel', config.hw.tensor_parallel)}"
    return None


def _run(task: Task, side: str) -> str | None:
    """One side from its start to its end. Returns why it failed, or None."""
    print(f"batchinfer: {DOING.get(side, f'running {side}')}", file=sys.stderr, flush=True)
    mark = f"bench:{secrets.token_hex(8)}"
    log_file = task.log_file(side)
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            command_of_child(_command(task, side)),
            env={**_environment(task.config), MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(None if side in MODULES else PEER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"not done after {PEER_TIMEOUT_S:,.0f} s"
        finally:
            kill_marked(mark)
            process.wait()
    return None if code == 0 else _reason(log_file, code)


def _reason(log_file: Path, code: int) -> str:
    killed = f"killed by {signal.Signals(-code).name}" if code < 0 else None
    return killed or last_words(log_file.read_text(errors="replace")[-TAIL_CHARACTERS:]) or f"exit code {code}"


def _command(task: Task, side: str) -> list[str]:
    """Ours and the ceilings run as a replica does: by torchrun where it has several ranks. A peer starts its own."""
    ranks = int(task.config.hw.tensor_parallel)
    start = torchrun(ranks, task.folder / f"{side}-ranks") if ranks > 1 and side in MODULES else [sys.executable]
    return [*start, "-m", {**MODULES, **PEER_MODULES}[side], str(task.folder)]


def _environment(config: Config) -> Mapping[str, str]:
    hw = config.hw
    threads = hw.cpus_per_gpu or max(1, hardware.usable_cores() // int(hw.tensor_parallel))
    root = str(Path(batchinfer.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    extra: dict[str, Any] = {name: str(value) for name, value in hw.env.items()}
    ours = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}  # nothing needs the network
    return {**os.environ, **ours, **extra, "PYTHONPATH": path}
