"""What a bench found, as plain values: the JSON line, from which the table is made too. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from batchinfer.bench.floor import Floor, floor, work_of
from batchinfer.bench.task import Answer, Task, Timing
from batchinfer.bench.workloads import Workload
from batchinfer.model.config import load_shape
from batchinfer.roofline import Ceilings, Cost

OURS, CEILINGS, NAIVE = "batchinfer", "ceilings", "hf one by one"
NAIVE_TARGET = 1.5  # at least so many times as fast as a first script with Hugging Face transformers


def collect(
    task: Task, workloads: Sequence[Workload], peers: Sequence[str], failures: Mapping[str, str], conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """From the answers in the task's folder. `failures`: why a side ended early, by side."""
    ours = Answer.load(task.answer_file(OURS))
    others = {peer: Answer.load(task.answer_file(peer)) for peer in peers}
    ceilings = load_ceilings(task)
    versions = {name: value for answer in (ours, *others.values()) for name, value in answer.versions.items()}
    found = {
        workload.name: _workload(workload, ours, others, _floor(task, workload, ceilings, ours.kv_tokens))
        for workload in workloads
    }
    return {
        "conditions": {**conditions, **versions},
        "ceilings": None if ceilings is None else asdict(ceilings),
        "ready_s": ours.phases.get("ready"),
        "phases_s": ours.phases,
        "kv_tokens": ours.kv_tokens,
        "workloads": found,
        "peers": {peer: {"phases_s": answer.phases, "kv_tokens": answer.kv_tokens} for peer, answer in others.items()},
        "failures": {**failures, **_failures_within(others)},
    }


def load_ceilings(task: Task) -> Ceilings | None:
    file = task.answer_file(CEILINGS)
    return Ceilings.from_dict(json.loads(file.read_bytes())) if file.exists() else None


def _failures_within(others: Mapping[str, Answer]) -> dict[str, str]:
    return {f"{peer}, {workload}": why for peer, answer in others.items() for workload, why in answer.failures.items()}


def _floor(task: Task, workload: Workload, ceilings: Ceilings | None, kv_tokens: int | None) -> Floor | None:
    if ceilings is None or kv_tokens is None:
        return None
    model = task.config.model
    cost = Cost.of(load_shape(model), model.dtype, int(task.config.hw.tensor_parallel))
    return floor(work_of(workload.requests), cost, ceilings, kv_tokens)


def _workload(workload: Workload, ours: Answer, others: Mapping[str, Answer], lowest: Floor | None) -> dict[str, Any]:
    own = ours.timings.get(workload.name, {}).get("")
    peers = {
        f"{peer} {mode}".strip(): _timing(workload, timing)
        for peer, answer in others.items()
        for mode, timing in answer.timings.get(workload.name, {}).items()
    }
    return {
        "requests": len(workload.requests),
        "tokens_in": workload.tokens_in,
        "tokens_out": workload.tokens_out,
        OURS: None if own is None else _timing(workload, own),
        "floor": None if lowest is None else asdict(lowest),
        "times_floor": None if lowest is None or own is None else _gaps(own, lowest),
        "peers": peers,
        "times_naive_hf": None if own is None or NAIVE not in peers else peers[NAIVE]["seconds"] / own.seconds,
    }


def _gaps(own: Timing, lowest: Floor) -> dict[str, float]:
    return {name: own.seconds / getattr(lowest, f"{name}_s") for name in ("sequential", "library", "overlapped")}


def _timing(workload: Workload, timing: Timing) -> dict[str, Any]:
    """`seconds` and rates are of the whole workload, also where only `ran` requests of it were run, in `ran_seconds`."""
    seconds = timing.whole(workload)
    told = {name: value for name, value in asdict(timing).items() if value is not None}
    return {
        **told,
        "seconds": seconds,
        "ran_seconds": timing.seconds,
        "extrapolated": timing.ran < len(workload.requests),
        "out_tok_s": workload.tokens_out / seconds,
        "total_tok_s": (workload.tokens_in + workload.tokens_out) / seconds,
    }
