"""Where the time of a profiled window went: pure functions over what a profiler recorded.

An event is a name, when it began, how long it took and in which lane: a stream of the device, or a thread of the host. Every
instant of the window is given to exactly one thing, so that shares add up to one:

- *On a device* kernels of one stream may overlap, since a kernel of a programmatic dependent launch is resident before the one
  in front of it has ended. It only waits then, so the instant belongs to the earlier one. Streams run truly at once, and share.
- *On a host* operations are nested, and an instant belongs to the innermost.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

WINDOW = "profiled steps"  # the range of the host that all shares are of
PHASES = ("schedule", "build", "share", "forward", "wait", "collect", "sample")  # ranges inside a step of `Engine.step`
IDLE, OTHER = "idle", "other"

# The first pattern that a kernel's name holds gives its category. Attention and sampling come before GEMM, as their names may
# hold the types of a GEMM library.
CATEGORIES = tuple(
    (category, re.compile(pattern))
    for category, pattern in (
        ("copies", r"^Mem(cpy|set)"),
        (
            "communication",
            r"nccl|[Aa]ll_?[Rr]educe|[Aa]ll_?[Gg]ather|[Rr]educe_?[Ss]catter|^c10d::|^gloo:|^batchinfer::(push|split)_kernel$",
        ),
        (
            "sampling",
            r"greedy|gumbel|sampl|[Aa]rg_?[Mm]ax|[Tt]op_?[Kk]|[Rr]adix_?[Ss]ort|bitonicSort|SegmentedSort|^aten::sort"
            r"|scan_(innermost|outer)|aten::cumsum|multinomial|penalt|[Ll]og_?[Ss]oft_?[Mm]ax|logprob",
        ),
        ("attention", r"[Aa]ttention|flash|fmha|sdpa|[Ss]oft_?[Mm]ax"),
        (
            "GEMM",
            r"gemm|gemv|nvjet|cutlass|cublas|[Ss]plit_?[Kk]|skinny|linear_kernel|dot_kernel"
            r"|^aten::(add)?(mm|bmm|mv)$|^aten::(linear|matmul|baddbmm|dot|mkldnn_linear)",
        ),
        ("norms and elementwise", r"[Nn]orm|rope|rotary|silu|embedding"),
        (
            "copies",
            r"feed_tokens|[Cc]opy|CatArray|DeviceSelect|DeviceCompact|index|[Gg]ather|[Ss]catter"
            r"|^aten::(cat|stack|repeat_interleave)",
        ),
        (
            "norms and elementwise",
            r"elementwise|reduce_kernel|DeviceReduce|[Ff]ill"
            r"|^aten::(add|sub|mul|div|neg|pow|mean|sum|max|min|amax|amin|rsqrt|sin|cos|exp|log|where|clamp|maximum|minimum"
            r"|lt|le|gt|ge|eq|ne|bitwise_\w+|floor_divide|remainder|zero|tril|triu|arange|masked_fill)_?$",
        ),
    )
)
CATEGORY_NAMES = tuple(dict.fromkeys(["GEMM", "attention", "norms and elementwise", *(name for name, _ in CATEGORIES), OTHER]))


def category(name: str) -> str:
    """The category of a kernel, or of an operation of the host. Of our own kernels only the function's name counts."""
    subject = bare_name(name) if "batchinfer::" in name else name
    return next((category for category, pattern in CATEGORIES if pattern.search(subject)), OTHER)


def bare_name(name: str) -> str:
    """A function's qualified name without its result, template arguments and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0]


class Event(NamedTuple):
    """Times in microseconds."""

    name: str
    start: float
    duration: float
    lane: int

    @property
    def stop(self) -> float:
        return self.start + self.duration


Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same instants as intervals that neither overlap nor touch, in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif stop > start:
            merged.append((start, stop))
    return merged


def gaps(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """What the intervals leave free of the window."""
    begin, end = window
    busy = union((max(start, begin), min(stop, end)) for start, stop in intervals)
    edges = [begin, *(edge for interval in busy for edge in interval), end]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start]


def device_times(events: Sequence[Event], window: Interval) -> list[float]:
    """The time of each event inside the window that is its own: their sum is the time in which the device was busy."""
    own = _without_waiting(events, window)
    edges = sorted((edge, i) for i, interval in enumerate(own) if interval[1] > interval[0] for edge in interval)
    times, active = [0.0] * len(events), set[int]()
    before = 0.0
    for at, i in edges:
        for running in active:
            times[running] += (at - before) / len(active)
        active ^= {i}
        before = at
    return times


def _without_waiting(events: Sequence[Event], window: Interval) -> list[Interval]:
    """Each event from where those before it in its stream have ended, cut to the window."""
    begin, end = window
    reached: dict[int, float] = defaultdict(lambda: begin)
    own: list[Interval] = [(begin, begin)] * len(events)
    for i in sorted(range(len(events)), key=lambda i: events[i].start):
        event = events[i]
        stop = min(event.stop, end)
        own[i] = max(event.start, reached[event.lane]), stop
        reached[event.lane] = max(reached[event.lane], stop)
    return own


def host_times(events: Sequence[Event], window: Interval) -> list[float]:
    """The time of each operation inside the window without what it calls: nested events of one thread each."""
    begin, end = window
    inside = [max(0.0, min(event.stop, end) - max(event.start, begin)) for event in events]
    times = list(inside)
    above: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].duration)):
        callers = above[events[i].lane]
        while callers and events[callers[-1]].stop <= events[i].start:
            callers.pop()
        if callers:
            times[callers[-1]] -= inside[i]
        callers.append(i)
    return times


@dataclass(frozen=True)
class Part:
    """One line of a table: `us` of the window are its own, in `calls` events (of idleness: gaps)."""

    name: str
    us: float
    calls: int

    @property
    def mean_us(self) -> float:
        return self.us / self.calls if self.calls else 0.0


@dataclass(frozen=True)
class Trace:
    """What was recorded. `ranges`: what the host was doing, as the profiled program named it."""

    kernels: list[Event]
    ops: list[Event]
    ranges: list[Event]

    @property
    def window(self) -> Event:
        return next(event for event in self.ranges if event.name == WINDOW)


@dataclass(frozen=True)
class Breakdown:
    """A window by category and by name. The categories, idleness last, add up to `window_us`."""

    window_us: float
    categories: list[Part]
    names: list[Part]  # the costliest first
    phases: dict[str, float]  # microseconds of the host in each range of `PHASES`

    @property
    def idle(self) -> float:
        """Share of the window in which nothing ran."""
        return self.categories[-1].us / self.window_us


def read_trace(path: Path) -> Trace:
    """The events of a Chrome trace that torch.profiler wrote, packed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        recorded = json.load(file)["traceEvents"]
    on_device, on_host = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op", "user_annotation")
    kinds: dict[str, list[Event]] = {kind: [] for kind in (*on_device, *on_host)}
    for event in recorded:
        if event["ph"] == "X" and event.get("cat") in kinds:
            kinds[event["cat"]].append(_event(event))
    ops, ranges = (kinds[kind] for kind in on_host)
    return Trace([event for kind in on_device for event in kinds[kind]], ops, ranges)


def _event(raw: Mapping[str, Any]) -> Event:
    lane = raw.get("args", {}).get("stream", raw["tid"])
    return Event(raw["name"], float(raw["ts"]), float(raw["dur"]), int(lane))


def break_down(trace: Trace) -> Breakdown:
    """The window of a trace: of the device where there are kernels, else of the operations of the host's stepping thread."""
    window = trace.window
    bounds = (window.start, window.stop)
    if trace.kernels:
        events, times = trace.kernels, device_times(trace.kernels, bounds)
    else:
        events = [event for event in trace.ops if event.lane == window.lane]
        times = host_times(events, bounds)
    inside = [(e.name, us) for e, us in zip(events, times, strict=True) if e.stop > window.start and e.start < window.stop]
    free = gaps(((event.start, event.stop) for event in events), bounds)
    idle = Part(IDLE, sum(stop - start for start, stop in free), len(free))
    by_category = {part.name: part for part in _sums((category(name), us) for name, us in inside)}
    return Breakdown(
        window.duration,
        [*(by_category.get(name, Part(name, 0.0, 0)) for name in CATEGORY_NAMES), idle],
        sorted(_sums(inside), key=lambda part: -part.us),
        _phases(trace.ranges, window),
    )


def _sums(parts: Iterable[tuple[str, float]]) -> list[Part]:
    us: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, own in parts:
        us[name] += own
        calls[name] += 1
    return [Part(name, us[name], calls[name]) for name in us]


def _phases(ranges: Sequence[Event], window: Event) -> dict[str, float]:
    inside = [event for event in ranges if window.start <= event.start < window.stop]
    return {phase: sum(event.duration for event in inside if event.name == phase) for phase in PHASES}
