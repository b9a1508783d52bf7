"""What structured output costs the host: masks and matchers of a step, without a model.

    OMP_NUM_THREADS=2 python slurm/bench/grammar_masks.py --tokenizer /data/llama-3-8b --rows 256

Every row draws evenly from what its grammar allows, which is the worst case: a model would stay on well-trodden paths. Prints,
for each grammar, the milliseconds of compiling it, and of the parts of a step: masks of all rows (in OMP_NUM_THREADS threads,
without the GIL) and letting the matchers follow (in the engine's thread); and the microseconds of CPU time that a mask takes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from batchinfer.config import SamplingConfig
from batchinfer.data.grammar import GrammarCompiler
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.grammar import GrammarMasks, follow
from batchinfer.engine.sequence import Grammar, Request, SamplingParams, Sequence

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["alpha", "beta"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 40}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
        "score": {"type": "number"},
    },
    "required": ["name", "age", "tags", "address", "score"],
}
GRAMMARS = {
    "JSON schema": SamplingConfig(json_schema=json.dumps(SCHEMA)),
    "regex, words": SamplingConfig(regex=r"[A-Z][a-z]+( [a-z]+){2,10}\."),
    "choice of 100": SamplingConfig(choice=[f"category {i}" for i in range(100)]),
    "anything": SamplingConfig(regex="(?s:.*)"),
}


def sequences(grammar: Grammar, rows: int) -> list[tuple[int, Sequence]]:
    requests = [Request(i, [0], SamplingParams(), i, grammar) for i in range(rows)]
    return [(i, Sequence.from_request(request, 0.0, 1 << 20)) for i, request in enumerate(requests)]


@dataclass
class Spent:
    """Seconds: on the wall for each step's masks and its following, and of CPU time for all masks."""

    filling: list[float] = field(default_factory=list)
    following: list[float] = field(default_factory=list)
    cpu: float = 0.0


def steps(grammar: Grammar, eos: int, rows: int, count: int) -> Spent:
    """So many steps. A row that ends makes place for a new one."""
    masks, rng, places, spent = GrammarMasks(frozenset([eos])), np.random.default_rng(0), sequences(grammar, rows), Spent()
    for _ in range(count):
        begin, cpu = time.perf_counter(), time.process_time()
        bitmask = masks.fill(places).bitmask
        spent.filling.append(time.perf_counter() - begin)
        spent.cpu += time.process_time() - cpu
        allowed = (np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")) for words in bitmask)
        tokens = [int(rng.choice(ids)) for ids in allowed]
        begin = time.perf_counter()
        errors = [follow(seq.matcher, token) for (_, seq), token in zip(places, tokens, strict=True) if seq.matcher is not None]
        spent.following.append(time.perf_counter() - begin)
        assert not any(errors)
        fresh = sequences(grammar, rows)
        places = [fresh[i] if token == eos else places[i] for i, token in enumerate(tokens)]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    eos = tokenizer.eos_token_id
    assert eos is not None, "tokenizer_config.json names no eos_token"
    vocab_size = tokenizer.largest_id + 1
    compiler = GrammarCompiler(tokenizer, vocab_size, [eos])
    begin = time.perf_counter()
    compiler.compile(SamplingConfig(regex="a"))
    print(f"{vocab_size:,} tokens, read in {time.perf_counter() - begin:.2f} s; {arguments.rows} rows; ms")
    print(f"{'':14}{'compile':>9}{'masks':>9}{'worst':>9}{'follow':>9}{'CPU us a mask':>15}")
    for name, sampling in GRAMMARS.items():
        begin = time.perf_counter()
        grammar = compiler.compile(sampling)
        compiling = time.perf_counter() - begin
        assert grammar is not None
        spent = steps(grammar, eos, arguments.rows, arguments.steps)
        parts = (compiling, median(spent.filling), max(spent.filling), median(spent.following))
        cpu = spent.cpu / arguments.steps / arguments.rows
        print(f"{name:14}" + "".join(f"{part * 1e3:9.2f}" for part in parts) + f"{cpu * 1e6:15.1f}")


if __name__ == "__main__":
    main()
