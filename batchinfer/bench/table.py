"""What a bench found, for people: a table for each workload, and beside it the conditions. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batchinfer.bench.results import NAIVE_TARGET, OURS

HEAD = ("", "seconds", "out tok/s", "total tok/s", "first token", "ours / this", "")
FLOORS = (
    ("sequential_s", "floor, one after the other"),
    ("library_s", "floor, at the library's GEMM rates"),
    ("overlapped_s", "floor, side by side"),
)


def show(found: Mapping[str, Any]) -> None:
    """Tables on a terminal, aligned text elsewhere, and the JSON line last."""
    print("\n".join(facts(found)))
    for name, workload in found["workloads"].items():
        _print(title(name, workload), list(rows(workload)))
        print(verdict(name, workload, found["conditions"]["gpus"] > 0), end="")
    for side, why in found["failures"].items():
        print(f"{side}: no figures: {why}")
    print(json.dumps(found), flush=True)


def facts(found: Mapping[str, Any]) -> list[str]:
    """Conditions, ceilings, start and memory, a line each."""
    where = found["conditions"]
    commit = [f"commit {where['commit'][:12]}"] if where["commit"] else []
    packages = [name for name in ("torch", "cuda", "batchinfer", "transformers", "vllm") if where.get(name) is not None]
    made = [*(f"{name} {where[name]}" for name in packages), *commit]
    weights = "random weights" if where["weights"] == "random" else f"weights of {where['weights']}"
    model = f"{where['architecture']}, {where['parameters']:,} parameters, {weights}, {where['dtype']}"
    return [
        f"device:    {', '.join(_device(where))}",
        f"software:  {', '.join(made)}",
        f"model:     {model}; {where['sampling']}",
        *_ceilings(found["ceilings"], where["gpus"]),
        *_start(found),
    ]


def _device(where: Mapping[str, Any]) -> Iterator[str]:
    device = where["device"]
    yield device["name"] if where["gpus"] < 2 else f"{where['gpus']} x {device['name']}"
    for key, words in (
        ("memory_gib", "{:.1f} GiB"),
        ("power_limit_w", "{:,.0f} W"),
        ("sm_clock_mhz", "{:,} MHz at most"),
        ("driver", "driver {}"),
        ("cores", "{:,} cores"),
    ):
        if device.get(key) is not None:
            yield words.format(device[key])


def _ceilings(ceilings: Mapping[str, Any] | None, gpus: int) -> list[str]:
    if ceilings is None:
        return []
    rough = "" if gpus else " (small samples on a CPU: the floor is an order of magnitude)"
    rows, best = max(ceilings["gemm"], key=lambda entry: entry[1])
    parts = [
        f"read {_rate(ceilings['read'], 'B')}",
        f"copy {_rate(ceilings['copy'], 'B')} read and written",
        f"GEMM {_rate(best, 'FLOP')} at {rows:,} rows, {_rate(ceilings['gemm'][0][1], 'FLOP')} at {ceilings['gemm'][0][0]:,}",
        f"causal attention {_rate(ceilings['attention'], 'FLOP')}",
    ]
    return [f"ceilings:  {', '.join(parts)}{rough}"]


def _rate(value: float, unit: str) -> str:
    size, prefix = next(((size, prefix) for size, prefix in ((1e12, "T"), (1e9, "G")) if value >= size), (1e6, "M"))
    return f"{value / size:,.{2 if value < 100 * size else 0}f} {prefix}{unit}/s"


def _start(found: Mapping[str, Any]) -> list[str]:
    if found["ready_s"] is None:
        return []
    phases = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in found["phases_s"].items() if name != "ready")
    peers = [f"{peer} {told['phases_s']['ready']:,.1f} s" for peer, told in found["peers"].items() if "ready" in told["phases_s"]]
    beside = f"; beside it {', '.join(peers)}" if peers else ""
    held = [f"{peer} {told['kv_tokens']:,}" for peer, told in found["peers"].items() if told["kv_tokens"]]
    return [
        f"start:     ready {found['ready_s']:,.1f} s after the process began ({phases}){beside}",
        f"KV cache:  {found['kv_tokens']:,} tokens{'; beside it ' + ', '.join(held) if held else ''}",
    ]


def title(name: str, workload: Mapping[str, Any]) -> str:
    requests = f"{workload['requests']:,} request{'s' if workload['requests'] > 1 else ''}"
    return f"{name}: {requests}, {workload['tokens_in']:,} tokens in, {workload['tokens_out']:,} out"


def rows(workload: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Cells as HEAD names them: our engine, the floors, the peers."""
    lowest, own = workload["floor"], workload[OURS]
    if own is not None:
        yield _engine_row(OURS, own, None)
    for key, words in FLOORS if lowest is not None else ():
        first = lowest["first_token_s"] if key == "sequential_s" and workload["requests"] == 1 else None
        both = workload["tokens_out"], workload["tokens_in"] + workload["tokens_out"]
        rates = [f"{tokens / lowest[key]:,.0f}" for tokens in both]
        yield words, _seconds(lowest[key]), *rates, _milliseconds(first), _ratio(own, lowest[key]), ""
    for peer, timing in workload["peers"].items():
        yield _engine_row(peer, timing, own)


def _engine_row(name: str, timing: Mapping[str, Any], own: Mapping[str, Any] | None) -> tuple[str, ...]:
    about = "~" if timing["extrapolated"] else ""
    rates = (f"{about}{timing[key]:,.0f}" for key in ("out_tok_s", "total_tok_s"))
    times = _ratio(own, timing["seconds"])
    first = _milliseconds(timing.get("first_token_s"))
    return name, about + _seconds(timing["seconds"]), *rates, first, times and about + times, _detail(timing)


def _ratio(own: Mapping[str, Any] | None, seconds: float) -> str:
    return "" if own is None else f"{own['seconds'] / seconds:,.3g}"


def _detail(timing: Mapping[str, Any]) -> str:
    """How a figure came about, and what the engine says of itself."""
    parts, seconds = [], timing["all_seconds"]
    if timing["extrapolated"]:
        parts.append(f"extrapolated from {timing['ran']:,} requests in {timing['ran_seconds']:,.1f} s")
    if len(seconds) > 1:
        parts.append(f"{_seconds(min(seconds))} to {_seconds(max(seconds))} s in {len(seconds)}")
    if "steps" in timing:
        parts.append(f"{timing['steps']:,} steps, at most {timing['peak_running']:,} at once")
        parts.append(f"{timing['preemptions']:,} preemptions")
    return ", ".join(parts)


def _seconds(value: float) -> str:
    return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:,.1f} ms"


def verdict(name: str, workload: Mapping[str, Any], on_gpu: bool) -> str:
    """A line, or nothing where the naive way was not run. What is promised is of GPUs: on a CPU both call the same library."""
    times = workload["times_naive_hf"]
    if times is None:
        return ""
    kept = "kept" if times >= NAIVE_TARGET else "NOT kept"
    promise = f"; at least {NAIVE_TARGET} is promised: {kept}" if on_gpu else ""
    return f"{name}: {times:,.2f} times as fast as naive Hugging Face, one request at a time{promise}\n"


def _print(heading: str, lines: Sequence[tuple[str, ...]]) -> None:
    if not sys.stdout.isatty():
        print("\n" + heading + "\n" + "\n".join(aligned([HEAD, *lines])))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=heading)
    for number, column in enumerate(HEAD):
        table.add_column(column, justify="left" if number in (0, len(HEAD) - 1) else "right")
    for line in lines:
        table.add_row(*map(Text, line))
    Console().print(table)


def aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column and the last to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    found = []
    for line in lines:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        found.append("  ".join([line[0].ljust(widths[0]), *numbers, line[-1]]).rstrip())
    return found
