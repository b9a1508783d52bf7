"""What `bench` and the processes that it starts tell each other, as JSON files in one folder.

`task.json` says what to do; each side (the engine, a peer, the ceilings) answers in `<side>.json`, written anew after every
workload, so that one that dies leaves what it had measured. No torch.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median_low
from typing import Any

from batchinfer.bench.workloads import BenchRequest, Workload, load_workloads
from batchinfer.config import Config, ConfigError, from_dict
from batchinfer.job.replica import SENTENCE
from batchinfer.memory import max_model_len
from batchinfer.model.config import load_shape
from batchinfer.publish import replace_bytes


@dataclass(frozen=True)
class Task:
    """The request with hardware and dtype as facts, and the folder of files. `checkpoint`: a folder with a config.json."""

    folder: Path
    config: Config
    checkpoint: str

    @classmethod
    def load(cls, folder: str) -> Task:
        raw = json.loads((Path(folder) / "task.json").read_bytes())
        return cls(Path(folder), from_dict(raw["config"]), raw["checkpoint"])

    def save(self) -> None:
        content = {"config": self.config.to_dict(), "checkpoint": self.checkpoint}
        replace_bytes(self.folder / "task.json", json.dumps(content).encode())

    def workloads(self) -> list[Workload]:
        shape, config = load_shape(self.config.model), self.config
        return load_workloads(config.bench, config.seed, shape.vocab_size, max_model_len(config.model, shape))

    def answer_file(self, side: str) -> Path:
        return self.folder / f"{side}.json"

    def log_file(self, side: str) -> Path:
        return self.folder / f"{side}.log"


@dataclass(frozen=True)
class Timing:
    """One way of running one workload. `ran` requests of it were run, with these tokens, in `seconds`."""

    ran: int
    tokens_in: int
    tokens_out: int
    seconds: float
    all_seconds: list[float] = field(default_factory=list)  # of every repetition
    first_token_s: float | None = None  # from the start of the workload
    peak_running: int | None = None  # sequences at once
    steps: int | None = None
    preemptions: int | None = None
    recomputed_tokens: int | None = None
    prefix_hit_tokens: int | None = None

    def whole(self, workload: Workload) -> float:
        """Seconds for all of the workload: as measured, else by its completion tokens."""
        return self.seconds if self.ran == len(workload.requests) else self.seconds * workload.tokens_out / self.tokens_out


@dataclass
class Answer:
    """What a side has to say. `timings`: by workload, then by mode (`""` where there is only one)."""

    versions: dict[str, str] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)  # seconds since the process began, or of a part; `ready` is the end
    kv_tokens: int | None = None  # what the KV cache holds
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # by workload; "" is the whole side

    def put(self, workload: Workload, mode: str, timing: Timing) -> None:
        self.timings.setdefault(workload.name, {})[mode] = timing

    def save(self, path: Path) -> None:
        replace_bytes(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> Answer:
        """Empty when nothing was said."""
        if not path.exists():
            return cls()
        raw = json.loads(path.read_bytes())
        timings = {
            workload: {mode: Timing(**timing) for mode, timing in modes.items()} for workload, modes in raw.pop("timings").items()
        }
        return cls(timings=timings, **{f.name: raw[f.name] for f in fields(cls) if f.name != "timings"})


def repeated(measure: Callable[[], Timing], count: int) -> Timing:
    """The median of so many repetitions (of two the faster), with the seconds of all."""
    timings = [measure() for _ in range(count)]
    seconds = [timing.seconds for timing in timings]
    chosen = timings[seconds.index(median_low(seconds))]
    return Timing(**{**asdict(chosen), "all_seconds": seconds})


def totals(requests: Sequence[BenchRequest]) -> dict[str, Any]:
    """The counts of a Timing for requests that are run to their ends."""
    return {
        "ran": len(requests),
        "tokens_in": sum(len(request.token_ids) for request in requests),
        "tokens_out": sum(request.max_tokens for request in requests),
    }


def run_side(work: Callable[[Task], None], argv: Sequence[str]) -> int:
    """The main function of a side: an error's traceback goes to its log, and one sentence behind it. Returns the exit code."""
    try:
        work(Task.load(argv[0]))
    except Exception as error:
        logging.exception("failed")
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        print(f"{SENTENCE}{kind}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    return 0
