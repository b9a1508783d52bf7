"""`python -m batchinfer profile`: an engine in a steady state, watched for a few steps.

Owns the work that is watched, the ranges that name what the host does in a step, and what is printed and left in the folder
`profile.dir`. How a trace becomes shares of the window is `timeline`'s business. Nothing here costs anything when it is not
used: the ranges are put around the methods of one engine, and only to be profiled.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from batchinfer.config import Config, ConfigError, ProfileConfig, show
from batchinfer.engine.engine import Engine, build_engine, serve
from batchinfer.engine.model_runner import build_runner
from batchinfer.engine.sequence import Request, SamplingParams, StepStats
from batchinfer.job.manifest import git_commit, versions
from batchinfer.job.plan import resolved
from batchinfer.memory import max_model_len
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import init_distributed
from batchinfer.timeline import IDLE, PHASES, WINDOW, Breakdown, Part, break_down, read_trace
from batchinfer.worker.__main__ import choose_device, keep_out_of_garbage_collection

TRACE, SNAPSHOT, REPORT = "trace.json.gz", "memory.pickle", "nsys"  # in the folder; nsys adds its own ending
UNDER_NSYS = "BATCHINFER_UNDER_NSYS"  # set for the process that nsys watches
USUAL_PROMPT, USUAL_OUTPUT = 544, 288  # mean lengths where nothing is said: the `mixed` of `bench`
SPREAD = 8  # lengths lie between 1/8 and 15/8 of their mean
SETTLING_STEPS = 2  # the first steps under a profiler pay for its own start
SNAPSHOT_ENTRIES = 200_000  # allocations that a memory snapshot goes back
TOP_NAMES, NAME_WIDTH = 15, 100

Range = Callable[[str], contextlib.AbstractContextManager[Any]]


def profile(config: Config, overrides: Sequence[str]) -> int:
    """The whole verb. `overrides`: the words that made `config`, for processes that do the same again. Returns the exit code."""
    config = resolved(config)
    _check(config)
    folder = Path(str(config.profile.dir)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if config.profile.nsys and UNDER_NSYS not in os.environ:
        return _start(nsys_command(folder, overrides), UNDER_NSYS)
    ranks = int(config.hw.tensor_parallel)
    if ranks > 1 and "WORLD_SIZE" not in os.environ:
        return _start(torchrun_command(ranks, overrides))
    return _profile_rank(config, folder)


def _check(config: Config) -> None:
    """Raises ConfigError for what could only fail once the model is loaded."""
    asked, on_gpu = config.profile, config.hw.gpu is not None
    for name in ("nsys", "memory_snapshot"):
        if getattr(asked, name) and not on_gpu:
            raise ConfigError(f"profile.{name}=true: must go with a GPU, and hw.gpu is null here")
    if asked.num_seqs is not None and asked.num_seqs > config.engine.max_num_seqs:
        limit = show("engine.max_num_seqs", config.engine.max_num_seqs)
        raise ConfigError(f"{show('profile.num_seqs', asked.num_seqs)}: must be at most {limit}")
    Work.lengths(asked, max_model_len(config.model, load_shape(config.model)))


def nsys_command(folder: Path, overrides: Sequence[str]) -> list[str]:
    """What records the same steps with Nsight Systems. Raises ConfigError where it is not installed."""
    options = "--trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop --cuda-graph-trace=node"
    command = ["nsys", "profile", *options.split(), "--force-overwrite=true", f"--output={folder / REPORT}", *_again(overrides)]
    if shutil.which("nsys") is None:
        raise ConfigError(f"profile.nsys=true: nsys is not on PATH here; where it is, this would run: {shlex.join(command)}")
    return command


def torchrun_command(ranks: int, overrides: Sequence[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *_again(overrides)[1:]]


def _again(overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "batchinfer", "profile", *overrides]


def _start(command: list[str], *marks: str) -> int:
    print(f"+ {shlex.join(command)}", flush=True)
    return subprocess.call(command, env={**os.environ, **dict.fromkeys(marks, "1")})


def _profile_rank(config: Config, folder: Path) -> int:
    """One rank's part: rank 0 steps, watches and reports, the others follow."""
    device = choose_device(config)
    parallel = init_distributed(device)
    shape = load_shape(config.model)
    try:
        if parallel.rank > 0:
            serve(build_runner(config, shape, parallel, device))
            return 0
        if config.profile.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES, stacks="python")
        engine = build_engine(config, shape, parallel, device)
        try:
            seen = watch(engine, config, shape.vocab_size, device, folder)
        finally:
            engine.close()
        if config.profile.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
        _report(config, seen, device, folder)
        return 0
    finally:
        parallel.close()


@dataclass
class Seen:
    """What was measured. Without a breakdown nsys has the rest."""

    stats: list[StepStats]  # of the steps in the window
    plain_s: float  # mean of a step just before, with no profiler
    watched_s: float  # and in the window
    breakdown: Breakdown | None = None


def watch(engine: Engine, config: Config, vocab_size: int, device: torch.device, folder: Path) -> Seen:
    """Brings the engine into its steady state, times some steps, then records as many under a profiler."""
    work = Work(engine, config.profile, vocab_size, config.engine.max_num_seqs)
    work.fill()
    keep_out_of_garbage_collection()
    work.run(config.profile.warmup_steps)
    plain_s = _timed(work, config.profile.steps)[1]
    if config.profile.nsys:
        stats, watched_s = _under_nsys(work, config.profile.steps)
        return Seen(stats, plain_s, watched_s)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    annotate(engine, torch.profiler.record_function)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        work.run(SETTLING_STEPS)
        with torch.profiler.record_function(WINDOW):
            stats, watched_s = _timed(work, config.profile.steps)
    profiler.export_chrome_trace(str(folder / TRACE))
    return Seen(stats, plain_s, watched_s, break_down(read_trace(folder / TRACE)))


def _under_nsys(work: Work, steps: int) -> tuple[list[StepStats], float]:
    annotate(work.engine, torch.cuda.nvtx.range)
    work.run(SETTLING_STEPS)
    torch.cuda.profiler.start()
    with torch.cuda.nvtx.range(WINDOW):
        timed = _timed(work, steps)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return timed


def _timed(work: Work, steps: int) -> tuple[list[StepStats], float]:
    """(statistics, mean seconds) of the next steps. The host waits in every step for the device, so its clock tells both."""
    begin = time.perf_counter()
    stats = work.run(steps)
    return stats, (time.perf_counter() - begin) / steps


def annotate(engine: Engine, named: Range) -> None:
    """Puts the ranges of `timeline.PHASES` around what this one engine does in a step."""
    for owner, method, phase in (
        (engine.scheduler, "schedule", "schedule"),
        (engine.builder, "build", "build"),
        (engine.runner, "share", "share"),
        (engine.runner, "forward", "forward"),
        (engine, "_collect", "collect"),
        (engine.runner, "sample", "sample"),
    ):
        _wrap(owner, method, named, phase)
    sample = engine.runner.sample
    engine.runner.sample = lambda *args: Awaited(sample(*args), named)  # type: ignore[method-assign]


def _wrap(owner: Any, method: str, named: Range, phase: str) -> None:
    inner = getattr(owner, method)

    def in_range(*args: Any, **kwargs: Any) -> Any:
        with named(phase):
            return inner(*args, **kwargs)

    setattr(owner, method, in_range)


@dataclass(frozen=True, slots=True)
class Awaited:
    """Tokens that are being drawn; waiting for them is a range of its own."""

    drawn: Any
    named: Range

    def result(self) -> Any:
        with self.named("wait"):
            return self.drawn.result()


@dataclass
class Work:
    """Requests of random tokens that keep an engine in one state for as long as it is stepped.

    The first ones are as old as rows of a long run are at any moment: some of their tokens count as prompt. What ends is
    replaced. Nothing is shared but the prefix, everything is greedy and goes on to its length.
    """

    engine: Engine
    asked: ProfileConfig
    vocab_size: int
    max_num_seqs: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    next_id: int = 0

    @staticmethod
    def lengths(asked: ProfileConfig, longest: int) -> tuple[int, int]:
        """Mean tokens of prompt and completion. Raises ConfigError when the longest of them do not fit together."""
        longest -= asked.shared_prefix_len
        usual = min(1.0, longest / (2 * (USUAL_PROMPT + USUAL_OUTPUT)))
        prompt = asked.prompt_tokens or max(SPREAD, int(usual * USUAL_PROMPT))
        output = asked.output_tokens or max(SPREAD, int(usual * USUAL_OUTPUT))
        needed = _longest(prompt) + _longest(output)
        if needed > longest:
            raise ConfigError(
                f"profile.prompt_tokens={prompt} and profile.output_tokens={output}: sequences of up to {needed} tokens, and "
                f"model.max_model_len leaves {longest} for them"
            )
        return prompt, output

    def __post_init__(self) -> None:
        self.prompt, self.output = self.lengths(self.asked, self.engine.max_model_len)
        self.num_seqs = self.asked.num_seqs or self.max_num_seqs
        self.prefix = self.rng.choices(range(self.vocab_size), k=self.asked.shared_prefix_len)

    def fill(self) -> None:
        """Runs until every sequence decodes, or until the KV cache takes no more."""
        for _ in range(self.num_seqs):
            self._add(*self._aged())
        first = self.next_id
        self._top_up()
        while any(request_id < first for request_id in self.engine.scheduler.waiting) and self._step().prefill_tokens:
            pass

    def run(self, steps: int) -> list[StepStats]:
        return [self._step() for _ in range(steps)]

    def _step(self) -> StepStats:
        stats = self.engine.step()[1]
        self._top_up()
        return stats

    def _top_up(self) -> None:
        """As many sequences as asked for, and some in waiting where the engine has no place for more."""
        ahead = max(8, self.num_seqs // 4) if self.num_seqs == self.max_num_seqs else 0
        while len(self.engine.sequences) < self.num_seqs + ahead:
            self._add(*self._fresh())

    def _fresh(self) -> tuple[int, int]:
        """(prompt tokens, tokens to generate) of a request that is still to begin."""
        prompt = self._draw(self.prompt)
        if self.asked.workload == "mixed":
            return prompt, self._draw(self.output)
        return prompt, 1 if self.asked.workload == "prefill" else self.engine.max_model_len - len(self.prefix) - prompt

    def _aged(self) -> tuple[int, int]:
        """The same of one that has been running for a while, though it is told to the engine only now."""
        prompt, output = self._fresh()
        age = self.rng.randrange(min(output, self._draw(self.output)))
        return prompt + age, output - age

    def _draw(self, mean: int) -> int:
        return self.rng.randint(mean // SPREAD, _longest(mean))

    def _add(self, prompt: int, output: int) -> None:
        token_ids = self.prefix + self.rng.choices(range(self.vocab_size), k=prompt)
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        self.engine.add(Request(self.next_id, token_ids, sampling, seed=self.next_id))
        self.next_id += 1


def _longest(mean: int) -> int:
    return 2 * mean - mean // SPREAD


def _report(config: Config, seen: Seen, device: torch.device, folder: Path) -> None:
    """The tables, the files, and one JSON line last."""
    facts = _facts(config, seen, device)
    print("\n".join(_head(facts, seen)))
    if seen.breakdown is not None:
        print("\n".join(_tables(seen.breakdown, len(seen.stats), device.type == "cuda")))
    print(f"\n{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    print(json.dumps(facts))


def _facts(config: Config, seen: Seen, device: torch.device) -> dict[str, Any]:
    steps, found = len(seen.stats), seen.breakdown
    facts: dict[str, Any] = {
        "verb": "profile",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": config.model.dtype,
        "tensor_parallel": config.hw.tensor_parallel,
        "profile": asdict(replace(config.profile, dir=None)),
        "steps": steps,
        "graph_steps": sum(stats.graph for stats in seen.stats),
        "sequences": _mean([stats.prefill_seqs + stats.decode_seqs for stats in seen.stats]),
        "prefill_tokens": _mean([stats.prefill_tokens for stats in seen.stats]),
        "decode_tokens": _mean([stats.decode_tokens for stats in seen.stats]),
        "preempted": sum(stats.preempted for stats in seen.stats),
        "step_ms": 1e3 * seen.plain_s,
        "profiled_step_ms": 1e3 * seen.watched_s,
        "commit": git_commit(),
        "versions": versions() | {"cuda": torch.version.cuda},
    }
    if found is not None:
        facts["idle_share"] = found.idle
        facts["categories"] = {part.name: _part(part, found, steps) for part in found.categories}
        facts["top"] = [{"name": part.name, **_part(part, found, steps)} for part in found.names[:TOP_NAMES]]
        facts["host_ms"] = {phase: us / steps / 1e3 for phase, us in found.phases.items()}
    return facts


def _part(part: Part, found: Breakdown, steps: int) -> dict[str, float]:
    return {
        "share": part.us / found.window_us,
        "ms_a_step": part.us / steps / 1e3,
        "calls_a_step": part.calls / steps,
        "mean_us": part.mean_us,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _head(facts: dict[str, Any], seen: Seen) -> list[str]:
    return [
        f"{facts['steps']} steps on {facts['device']} in {facts['dtype']}, {facts['profile']['workload']}: a step of "
        f"{facts['sequences']:,.1f} sequences computed {facts['prefill_tokens']:,.1f} prompt tokens and drew "
        f"{facts['decode_tokens']:,.1f}; {facts['preempted']} preempted",
        f"a step took {facts['profiled_step_ms']:.3f} ms, and {facts['step_ms']:.3f} ms before the profiler was on; "
        f"{facts['graph_steps']} of {facts['steps']} replayed a graph",
    ]


def _tables(found: Breakdown, steps: int, on_gpu: bool) -> list[str]:
    idle = IDLE if on_gpu else "outside of operations"
    categories = [replace(part, name=idle) if part.name == IDLE else part for part in found.categories]
    what = "kernels" if on_gpu else "operations"
    return [
        *_table("device time" if on_gpu else "host time", categories, found, steps),
        *_table(f"costliest {what}", found.names[:TOP_NAMES], found, steps),
        "",
        "host, ms a step, with what the profiler adds: "
        + ", ".join(f"{phase} {found.phases[phase] / steps / 1e3:.3f}" for phase in PHASES),
    ]


def _table(title: str, parts: Sequence[Part], found: Breakdown, steps: int) -> Iterator[str]:
    """Aligned lines; names come last, as they may be of any length."""
    yield f"\n{'share':>7}{'ms a step':>11}{'calls a step':>14}{'mean us':>10}  {title}"
    for part in parts:
        name = part.name if len(part.name) <= NAME_WIDTH else part.name[: NAME_WIDTH - 3] + "..."
        share, ms = part.us / found.window_us, part.us / steps / 1e3
        yield f"{share:7.1%}{ms:11.3f}{part.calls / steps:14,.1f}{part.mean_us:10.1f}  {name}"
