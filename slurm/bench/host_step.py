"""What one engine step costs the host: every part of `Engine.step`, without a model.

    python slurm/bench/host_step.py --rows 512 --context 500

A stand-in runner answers at once with a token for every row, so that what is timed is the engine alone: one thread, no device.
Prints the mean of each part in milliseconds over `--steps` steps, for synchronous and for overlapped stepping. `--features`
turns on what costs more: penalties and log-probabilities for every row (their answers too are made up).
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from batchinfer.engine.batch import Batch
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import Request, SamplingParams, StepResult, TokenLogprobs
from batchinfer.worker.__main__ import keep_out_of_garbage_collection

BLOCK_SIZE, VOCAB = 16, 32_000


class AnswerAtOnce:
    """A runner without a model: every row draws token 7."""

    def __init__(self, logprobs: bool) -> None:
        self.logprob = TokenLogprobs(7, -1.0, 1, [(7, -1.0)]) if logprobs else None
        self.num_samples = 0

    can_retry = True

    def share(self, batch: Batch) -> None:
        pass

    def forward(self, batch: Batch) -> None:
        pass

    def sample(self, batch: Batch, forward: Any, mask: object) -> AnswerAtOnce:
        self.num_samples = batch.num_samples
        return self

    def result(self) -> StepResult:
        logprobs = None if self.logprob is None else [self.logprob] * self.num_samples
        return StepResult([7] * self.num_samples, logprobs)

    def close(self) -> None:
        pass


class Stopwatch:
    """Sums the seconds spent in methods, by their names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self.seconds[method.strip("_")] += time.perf_counter() - begin

        setattr(owner, method, timed)


def measure(args: argparse.Namespace, overlap: bool) -> dict[str, float]:
    """Milliseconds a step of each part, and of the whole."""
    max_model_len = args.context + 2 * args.steps + 100
    blocks = BlockManager(args.rows * (max_model_len // BLOCK_SIZE + 1), BLOCK_SIZE, prefix_caching=True)
    scheduler = Scheduler(blocks, args.rows, args.rows * args.context, max_model_len)
    engine = Engine(AnswerAtOnce(args.features), scheduler, frozenset({2}), overlap)
    rng = random.Random(0)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_model_len)
    if args.features:
        sampling = SamplingParams(temperature=0.8, max_tokens=max_model_len, repetition_penalty=1.1, logprobs=1)
    for i in range(args.rows):
        prompt = [rng.randrange(3, VOCAB) for _ in range(args.context - rng.randrange(BLOCK_SIZE))]
        engine.add(Request(i, prompt, sampling, rng.getrandbits(64)))
    for _ in range(20):
        engine.step()
    keep_out_of_garbage_collection()
    watch = Stopwatch()
    watch.watch(scheduler, "schedule")
    watch.watch(engine.builder, "build")
    watch.watch(engine, "_describe")
    watch.watch(engine, "_collect")
    begin = time.perf_counter()
    for _ in range(args.steps):
        engine.step()
    whole = time.perf_counter() - begin
    assert engine.num_running == args.rows
    seconds = {**watch.seconds, "whole step": whole}
    return {name: 1000 * value / args.steps for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="running sequences, all in decode")
    parser.add_argument("--context", type=int, default=500, help="tokens of each at the start")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--features", action="store_true", help="penalties and log-probabilities for every row")
    args = parser.parse_args()
    columns = {"in turn": measure(args, overlap=False), "overlapped": measure(args, overlap=True)}
    print(f"{'ms a step':16}" + "".join(f"{name:>12}" for name in columns))
    for part in columns["in turn"]:
        print(f"{part:16}" + "".join(f"{column[part]:12.3f}" for column in columns.values()))
    both = ("schedule", "build")
    print(f"{'schedule + build':16}" + "".join(f"{sum(column[part] for part in both):12.3f}" for column in columns.values()))


if __name__ == "__main__":
    main()
