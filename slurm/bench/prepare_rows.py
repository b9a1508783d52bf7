"""How fast rows become prompts, and what that costs the thread that drives the engine.

Trains a byte-level tokenizer on Python's own standard library (or takes a checkpoint's: `--model`), cuts prompts of `--tokens`
tokens out of the same text, and prints three tables:

1. rows/s of `PromptBuilder.prepare`, and the CPU time a row costs the preparing thread itself. That thread waits without the GIL
   while the tokenizer's own threads work, so this is the time for which a row keeps the engine's thread from the GIL.
2. the same for decoding finished rows, one by one and in batches.
3. a loop in the main thread that stands for the engine (10 us of Python and 10 us of C without the GIL in turn, as torch
   operations are) beside a thread that prepares rows at a given rate: the part of its time in which the loop was neither on a CPU
   nor waiting for one, so waiting for the GIL (from Linux's schedstat, so that other work on the machine does not count), and
   the longest of a hundred steps of `--step-ms`, which other work does lengthen.

    python slurm/bench/prepare_rows.py --rows 1024
    RAYON_NUM_THREADS=1 python slurm/bench/prepare_rows.py --model /path/to/checkpoint --tokens 500
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from batchinfer.config import Config, InputConfig
from batchinfer.data.chat import ChatTemplate
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.tokenizer import Tokenizer

CHATML = """{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content | trim ~ '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def main() -> None:
    arguments = _arguments()
    texts = [path.read_text("utf-8", errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    tokenizer = Tokenizer.load(arguments.model) if arguments.model else Tokenizer(train(texts, arguments.vocab), {})
    template = ChatTemplate.load(arguments.model, arguments.template or (None if arguments.model else CHATML))
    prompts = list(_prompts(tokenizer, "".join(texts), arguments.rows, arguments.tokens))
    sources = {
        name: (_builder(tokenizer, template, **keys), table) for name, keys, table in _sources(prompts, template is not None)
    }
    print(f"{os.cpu_count()} CPUs, RAYON_NUM_THREADS={os.environ.get('RAYON_NUM_THREADS', 'unset')}, {arguments.rows:,} rows")
    print(f"{arguments.tokens} tokens a prompt, vocabulary {tokenizer.vocab_size:,}\n")
    _rates(sources, arguments.batches)
    _decoding(tokenizer, prompts)
    _interference(sources, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; without it a tokenizer is trained")
    parser.add_argument("--template", help="a chat template's file, in place of the checkpoint's or of ChatML")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 128, 1024], help="rows in one call of prepare")
    parser.add_argument("--rates", type=int, nargs="+", default=[40, 2000], help="rows/s that the engine takes")
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--switch-interval-ms", type=float, default=sys.getswitchinterval() * 1e3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement of the third table")
    return parser.parse_args()


def train(texts: list[str], vocab: int) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of `texts`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def _prompts(tokenizer: Tokenizer, text: str, rows: int, tokens: int) -> Iterator[str]:
    (ids,) = tokenizer.encode_batch([text[: 4 * 1024 * 1024]], add_special_tokens=False)
    draw = random.Random(0)
    for _ in range(rows):
        start = draw.randrange(len(ids) - tokens)
        yield tokenizer.decode(ids[start : start + tokens])


def _sources(prompts: list[str], has_template: bool) -> Iterator[tuple[str, dict[str, Any], pa.Table]]:
    yield "plain prompts", {"prompt_column": "p"}, pa.table({"p": prompts})
    yield (
        "prompt template",
        {"prompt_template": "Question {{ n }}: {{ p }}"},
        pa.table({"p": prompts, "n": list(range(len(prompts)))}),
    )
    if not has_template:
        return
    chats = [_chat(prompt) for prompt in prompts]
    yield "one user message", {"prompt_column": "p", "apply_chat_template": True}, pa.table({"p": prompts})
    yield "chats of 4, structs", {"messages_column": "m"}, pa.table({"m": chats})
    yield "chats of 4, JSON", {"messages_column": "m"}, pa.table({"m": [json.dumps(chat) for chat in chats]})


def _chat(prompt: str) -> list[dict[str, str]]:
    quarter = len(prompt) // 4
    roles = ("system", "user", "assistant", "user")
    return [{"role": role, "content": prompt[i * quarter : (i + 1) * quarter]} for i, role in enumerate(roles)]


def _builder(tokenizer: Tokenizer, template: ChatTemplate | None, **source: Any) -> PromptBuilder:
    return PromptBuilder(Config(input=InputConfig(**source)), tokenizer, template, 1 << 20, tokenizer.vocab_size)


def _rates(sources: dict[str, tuple[PromptBuilder, pa.Table]], batches: list[int]) -> None:
    print(f"{'source':20} {'rows a call':>12} {'rows/s':>8} {'own us/row':>11}")
    for name, (builder, table) in sources.items():
        for batch in batches:
            wall, own = _best(lambda b=builder, t=table, n=batch: _prepare(b, t, n))  # type: ignore[misc]
            print(f"{name:20} {batch:12,} {table.num_rows / wall:8,.0f} {own / table.num_rows * 1e6:11.0f}")


def _decoding(tokenizer: Tokenizer, prompts: list[str]) -> None:
    ids = tokenizer.encode_batch(prompts, add_special_tokens=False)
    print(f"\n{'decoding':20} {'':12} {'rows/s':>8} {'own us/row':>11}")
    for name, decode in (
        ("one by one", lambda: [tokenizer.decode(each) for each in ids]),
        ("decode_batch", lambda: tokenizer.decode_batch(ids)),
    ):
        wall, own = _best(decode)
        print(f"{name:20} {'':12} {len(ids) / wall:8,.0f} {own / len(ids) * 1e6:11.0f}")


def _interference(sources: dict[str, tuple[PromptBuilder, pa.Table]], arguments: argparse.Namespace) -> None:
    sys.setswitchinterval(arguments.switch_interval_ms / 1e3)
    print(f"\nsteps of {arguments.step_ms:g} ms, switch interval {arguments.switch_interval_ms:g} ms")
    print(f"{'beside':20} {'rows/s wanted':>13} {'made':>6} {'waits for the GIL':>18} {'99 % of steps within':>21}")
    _report_steps("nothing", 0, 0.0, *_steps(arguments.step_ms, arguments.seconds))
    for name, (builder, table) in sources.items():
        for rate in arguments.rates:
            with _Preparing(builder, table, rate) as thread:
                steps, waited = _steps(arguments.step_ms, arguments.seconds)
            _report_steps(name, rate, thread.rows / arguments.seconds, steps, waited)


def _report_steps(name: str, rate: int, made: float, steps: list[float], waited: float) -> None:
    slow = sorted(steps)[int(len(steps) * 0.99)]
    print(f"{name:20} {rate:13,} {made:6,.0f} {waited:18.1%} {slow * 1e3:18.2f} ms")


def _prepare(builder: PromptBuilder, table: pa.Table, batch: int) -> None:
    for start in range(0, table.num_rows, batch):
        piece = table.slice(start, batch)
        builder.prepare(piece, [("shard.parquet", start + i) for i in range(piece.num_rows)])


def _best(work: Callable[[], object]) -> tuple[float, float]:
    """Least wall and least own CPU seconds of three runs, after one that does not count."""
    work()
    times = []
    for _ in range(3):
        wall, own = time.perf_counter(), time.thread_time()
        work()
        times.append((time.perf_counter() - wall, time.thread_time() - own))
    return min(t[0] for t in times), min(t[1] for t in times)


def _steps(step_ms: float, seconds: float) -> tuple[list[float], float]:
    """Seconds of each step, and the part of all their time in which this thread waited for the GIL."""
    python = _fitted(lambda count: [None for _ in range(count)], 1000)
    data = bytes(_fitted(lambda count: zlib.crc32(bytes(count)), 50_000))
    steps: list[float] = []
    began, scheduled = time.perf_counter(), _scheduled()
    while time.perf_counter() < began + seconds:
        started = time.perf_counter()
        for _ in range(int(step_ms * 50)):
            _ = [None for _ in range(python)]
            zlib.crc32(data)
        steps.append(time.perf_counter() - started)
    wall = time.perf_counter() - began
    return steps, (wall - (_scheduled() - scheduled)) / wall


def _scheduled() -> float:
    """Seconds that this thread has been on a CPU or ready for one."""
    on_cpu, ready, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return (int(on_cpu) + int(ready)) / 1e9


def _fitted(work: Callable[[int], object], count: int) -> int:
    """The count with which `work` takes 10 us."""

    def taken() -> float:
        started = time.perf_counter()
        work(count)
        return time.perf_counter() - started

    return int(count * 10e-6 / min(taken() for _ in range(200)))


class _Preparing:
    """A thread that prepares rows over and over, at most `rate` of them a second, in calls of 128 rows or of a second's worth."""

    def __init__(self, builder: PromptBuilder, table: pa.Table, rate: int) -> None:
        self.rows = 0
        self._builder, self._table, self._rate = builder, table, rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Preparing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        started, batch = time.perf_counter(), min(128, self._rate, self._table.num_rows)
        keys = [("shard.parquet", i) for i in range(batch)]
        while not self._stop.is_set():
            if self.rows > (time.perf_counter() - started) * self._rate:
                self._stop.wait(0.001)
                continue
            self._builder.prepare(self._table.slice(self.rows % (self._table.num_rows - batch + 1), batch), keys)
            self.rows += batch


if __name__ == "__main__":
    main()
