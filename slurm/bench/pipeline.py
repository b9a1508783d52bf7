"""Parquet to Parquet against the engine alone, on the same rows: what reading, tokenising, detokenising and committing cost.

    python slurm/bench/pipeline.py                          # random Llama-2-7B weights on this host's GPU, rows of token ids
    python slurm/bench/pipeline.py --text                   # rows of text, tokenised and detokenised
    python slurm/bench/pipeline.py --stand-in-ms 20 hw=cpu  # no model: a device that takes 20 ms a step, whatever is in it

Rows have prompts of 64 to 1,024 tokens and completions of 64 to 512, both even, greedy, to their full length. *alone*: all of
them are added to the engine in the order in which the pipeline would, then it is stepped to the end; their token ids are mixed
up, so that neither run finds the other's prefixes. *pipeline*: `worker.replica.Replica` on a run of its own, from its
construction to the last commit. The engine is the same one, so loading is in neither. Further words are overrides. Prints a line
for each repetition, the ratio of the best ones, and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prepare_rows import train

from batchinfer.compose import compose
from batchinfer.config import Config
from batchinfer.data.prompts import PromptBuilder, load_tokenizer
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.batch import Batch
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine, build_engine
from batchinfer.engine.ordering import order_window
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import Request, StepResult
from batchinfer.job.manifest import Manifest, git_commit, versions
from batchinfer.job.plan import freeze, make_plan, resolved
from batchinfer.job.vitals import Pulse
from batchinfer.model.config import ModelShape, load_shape
from batchinfer.model.parallel import TensorParallel
from batchinfer.worker.__main__ import choose_device, keep_out_of_garbage_collection, step_before_all_else
from batchinfer.worker.progress import Progress
from batchinfer.worker.replica import Assignment, Replica

PROMPT, OUTPUT = (64, 1024), (64, 512)
STAND_IN_BLOCKS = 14_343  # what an H200 has beside Llama-2-7B
LAUNCH = bytes(10_000)  # a checksum over it takes a few microseconds without the GIL, as launching a kernel does


class StandIn:
    """A runner that computes nothing: its device takes the same time for every step, one after the other."""

    can_retry = False

    def __init__(self, step_s: float, launches: int, vocab_size: int) -> None:
        self.step_s, self.launches, self.vocab_size = step_s, launches, vocab_size
        self.free_at = 0.0
        self.rng = random.Random(0)

    def share(self, batch: Batch) -> None:
        pass

    def forward(self, batch: Batch) -> float:
        for _ in range(self.launches):
            zlib.crc32(LAUNCH)
        self.free_at = max(self.free_at, time.perf_counter()) + self.step_s
        return self.free_at

    def sample(self, batch: Batch, ready: float, mask: object) -> StandInDrawn:
        return StandInDrawn(ready, self.rng.choices(range(3, self.vocab_size), k=batch.num_samples))

    def close(self) -> None:
        pass


@dataclass
class StandInDrawn:
    ready: float
    token_ids: list[int]

    def result(self) -> StepResult:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return StepResult(self.token_ids)


@dataclass
class Clock:
    """Times every step of an engine."""

    engine: Engine
    first: float = 0.0
    last: float = 0.0
    steps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        inner: Callable[[], Any] = self.engine.step

        def step() -> Any:
            begin = time.perf_counter()
            self.first = self.first or begin
            outcome = inner()
            self.last = time.perf_counter()
            self.steps.append(self.last - begin)
            return outcome

        self.engine.step = step  # type: ignore[method-assign]

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        del self.engine.step


def main() -> None:
    args, overrides = arguments()
    with tempfile.TemporaryDirectory(prefix="pipeline-") as temporary:
        folder = Path(temporary)
        config = prepare(folder, args, overrides)
        step_before_all_else()
        if args.switch_interval_ms:
            sys.setswitchinterval(args.switch_interval_ms / 1e3)
        shape = load_shape(config.model)
        engine = build(config, shape, args)
        requests = make_requests(config, shape, engine)
        keep_out_of_garbage_collection()
        results = [measure(engine, requests, config, shape, folder, number) for number in range(args.repeats)]
        engine.close()
    report(results, config, args)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--text", action="store_true", help="rows of text instead of token ids")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--stand-in-ms", type=float, help="no model: a device that takes so long for a step")
    parser.add_argument("--launches", type=int, default=20, help="of the stand-in in a step: how often the host lets the GIL go")
    parser.add_argument("--switch-interval-ms", type=float, help="sys.setswitchinterval; default: what batchinfer sets")
    return parser.parse_known_args()


def prepare(folder: Path, args: argparse.Namespace, overrides: list[str]) -> Config:
    """Writes the rows, and for text a tokenizer; returns the request."""
    model = [] if any(word.startswith("model=") for word in overrides) else ["model=llama7b"]
    words = [*model, "model.load_format=random", "input=parquet", f"input.paths=[{folder}/in.parquet]"]
    words += ["input.sampling_column=sampling", "sampling.ignore_eos=true", *overrides]
    if args.stand_in_ms is not None:
        words.append("model.architecture.num_hidden_layers=1")  # the planner would miss the memory of a GPU
    column = "input.prompt_column=prompt" if args.text else "input.token_ids_column=prompt"
    config = compose([*words, column, "output.token_ids=true"], planning=True)
    rng = random.Random(0)
    vocab_size = load_shape(config.model).vocab_size
    lengths = [rng.randint(*PROMPT) for _ in range(args.rows)]
    prompts: list[Any] = [rng.choices(range(10, vocab_size), k=length) for length in lengths]
    if args.text:
        prompts = texts(folder, config.model.architecture, vocab_size, lengths, rng)
        config = replace(config, model=replace(config.model, path=str(folder)), output=replace(config.output, token_ids=False))
    sampling = [{"max_tokens": rng.randint(*OUTPUT)} for _ in range(args.rows)]
    kind = pa.string() if args.text else pa.list_(pa.int32())
    pq.write_table(pa.table({"prompt": pa.array(prompts, kind), "sampling": sampling}), folder / "in.parquet")
    return resolved(config)


def texts(folder: Path, architecture: dict[str, Any], vocab_size: int, lengths: list[int], rng: random.Random) -> list[str]:
    """Makes the folder a checkpoint without weights, with a tokenizer of Python's library, and cuts prompts out of that."""
    corpus = [path.read_text("utf-8", errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    train(corpus, vocab_size).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(architecture))
    tokenizer = Tokenizer.load(folder)
    (ids,) = tokenizer.encode_batch(["".join(corpus)[: 4 * 1024 * 1024]], add_special_tokens=False)
    starts = [rng.randrange(len(ids) - length) for length in lengths]
    return [tokenizer.decode(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def build(config: Config, shape: ModelShape, args: argparse.Namespace) -> Engine:
    if args.stand_in_ms is None:
        return build_engine(config, shape, TensorParallel(), choose_device(config))
    limits, length = config.engine, shape.max_position_embeddings
    blocks = BlockManager(STAND_IN_BLOCKS * 16 // limits.block_size, limits.block_size, limits.prefix_caching)
    scheduler = Scheduler(blocks, limits.max_num_seqs, limits.max_num_batched_tokens, length)
    runner = StandIn(args.stand_in_ms / 1e3, args.launches, shape.vocab_size)
    return Engine(runner, scheduler, frozenset(shape.eos_token_ids), limits.overlap)


def make_requests(config: Config, shape: ModelShape, engine: Engine) -> list[Request]:
    """What the pipeline will ask of the engine, with other tokens."""
    table = pq.read_table(config.input.paths[0])
    builder = PromptBuilder(config, load_tokenizer(config), None, engine.max_model_len, shape.vocab_size)
    rows = builder.prepare(table, [("in.parquet", i) for i in range(table.num_rows)])
    rng = random.Random(1)
    requests = []
    for i in order_window([row.token_ids or [] for row in rows]):
        row = rows[i]
        assert row.token_ids is not None and row.sampling is not None, row.error_message
        other = rng.choices(range(10, shape.vocab_size), k=len(row.token_ids))
        requests.append(Request(-1 - i, other, row.sampling, row.seeds[0]))
    return requests


def measure(
    engine: Engine, requests: list[Request], config: Config, shape: ModelShape, folder: Path, number: int
) -> dict[str, float]:
    """Both, one after the other."""
    with Clock(engine) as clock:
        begin = time.perf_counter()
        for request in requests:
            engine.add(rotated(request, number, shape.vocab_size))
        while engine.has_work():
            engine.step()
        alone = time.perf_counter() - begin
        alone_steps, alone_step = len(clock.steps), statistics.mean(clock.steps)
    config = replace(config, output=replace(config.output, dir=str(folder / f"run{number}")), seed=number)
    run_dir = freeze(make_plan(config))
    assignment = Assignment(run_dir, Manifest.load(run_dir), config, run_dir.new_replica("bench"), None)
    progress = Progress(run_dir, assignment.name)
    progress.start()
    with Clock(engine) as clock:
        begin = time.perf_counter()
        finished = Replica(assignment, shape, engine, progress, Pulse()).run()
        end = time.perf_counter()
    progress.close()
    assert finished and len(list(run_dir.completions.iterdir())) == len(assignment.manifest.units)
    shutil.rmtree(run_dir.root)
    stepping = clock.last - clock.first
    return {
        "alone_s": alone,
        "pipeline_s": end - begin,
        "before_first_step_s": clock.first - begin,
        "after_last_step_s": end - clock.last,
        "beside_a_step_ms": 1e3 * (stepping - sum(clock.steps)) / len(clock.steps),
        "step_ms": 1e3 * statistics.mean(clock.steps),
        "alone_step_ms": 1e3 * alone_step,
        "steps": len(clock.steps),
        "alone_steps": alone_steps,
    }


def rotated(request: Request, by: int, vocab_size: int) -> Request:
    """The same request with other tokens, so that a repetition finds no prefix of the one before."""
    return replace(request, prompt_token_ids=[10 + (token + by) % (vocab_size - 10) for token in request.prompt_token_ids])


def report(results: list[dict[str, float]], config: Config, args: argparse.Namespace) -> None:
    names = list(results[0])
    print("  ".join(names))
    for result in results:
        print("  ".join(f"{result[name]:{len(name)}.{0 if name.endswith('steps') else 3}f}" for name in names))
    best = {name: min(result[name] for result in results) for name in ("alone_s", "pipeline_s")}
    ratio = best["alone_s"] / best["pipeline_s"]
    print(f"Parquet to Parquet at {ratio:.1%} of the engine alone ({best['pipeline_s']:.2f} s and {best['alone_s']:.2f} s)")
    asked = {**vars(args), "max_num_seqs": config.engine.max_num_seqs, "dtype": config.model.dtype}
    facts = {"bench": "pipeline", "ratio": ratio, **asked, "results": results, "commit": git_commit(), "versions": versions()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
