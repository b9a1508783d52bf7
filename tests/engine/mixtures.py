"""Requests that ask for everything an engine can do, in one batch; and a driver that ends some of them from outside."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.config import SamplingConfig
from batchinfer.data.grammar import GrammarCompiler
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.engine import Engine
from batchinfer.engine.sequence import Request, SamplingParams, StepStats
from tests.engine.told import Told

TOKENIZER = Tokenizer.load(Path(__file__).resolve().parents[2] / "batchinfer" / "tiny" / "model")
VOCAB_SIZE = 4100  # four ids more than the tokenizer has
ENDS = [1, 0]
MODEL: dict[str, Any] = {
    "family": "Qwen3",
    "head_dim": 12,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": ENDS,
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention"],
}  # for `save_checkpoint`
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
GRAMMARS = [
    SamplingConfig(json_schema=json.dumps(SCHEMA)),
    SamplingConfig(regex=r"[a-f]{2,9}(-\d{1,2})?"),
    SamplingConfig(choice=["yes", "yes, and more", " no"]),
]


def mixed_requests(count: int) -> list[Request]:
    """Each draws its parameters from what there is. Prompts are of few different tokens, and many begin alike."""
    rng = random.Random(11)
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, ENDS)
    words = rng.sample(range(2, VOCAB_SIZE), 12)
    common = rng.choices(words, k=30)
    return [_request(number, common, words, compiler, rng) for number in range(count)]


def _request(number: int, common: list[int], words: list[int], compiler: GrammarCompiler, rng: random.Random) -> Request:
    prompt = common[: rng.choice([0, 9, 16, 30])] + rng.choices(words, k=rng.randint(1, 10))
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 0.8, 1.5]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 0, 30]),
        max_tokens=rng.randint(1, 20),
        min_tokens=rng.choice([0, 0, 4]),
        stop_token_ids=tuple(rng.sample(words, 2)),
        ignore_eos=rng.random() < 0.3,
        repetition_penalty=rng.choice([1.0, 1.6, 0.8]),
        presence_penalty=rng.choice([0.0, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        logprobs=rng.choice([None, None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 2]),
    )
    grammar = compiler.compile(rng.choice([*GRAMMARS, SamplingConfig(), SamplingConfig(), SamplingConfig()]))
    return Request(number, prompt, sampling, rng.getrandbits(64), grammar)


def run_mixture(
    engine: Engine, requests: list[Request], stop_after: Mapping[int, int] = {}, seed: int = 0
) -> tuple[dict[int, Told], list[StepStats]]:
    """What the engine told of each request, and of its steps. Requests come a few at a time.

    A request in `stop_after` is aborted after so many tokens, as one that a stop string ends; after 0 at any moment.
    """
    rng = random.Random(seed)
    told, ended = {request.request_id: Told() for request in requests}, set[int]()
    to_come, steps = list(requests), list[StepStats]()
    while to_come or engine.has_work():
        for _ in range(rng.choice([0, 1, 5])):
            if to_come:
                engine.add(to_come.pop(0))
        for number in [i for i in engine.sequences if stop_after.get(i) == 0]:
            if rng.random() < 0.1:
                ended.add(number)
                engine.abort(number)
        if not engine.has_work():
            continue
        outputs, stats = engine.step()
        steps.append(stats)
        for output in outputs:
            number = output.request_id
            assert number not in ended, "an answer after the end"
            assert output.error is None
            told[number].add(output)
            if output.finish_reason is not None:
                ended.add(number)
            elif len(told[number].token_ids) == stop_after.get(number):
                ended.add(number)
                engine.abort(number)
        engine.scheduler.check_invariants()
    assert ended == set(told)
    return told, steps
