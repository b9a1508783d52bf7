"""Completions under a grammar: always within it, whatever the model thinks, and alone in being changed by it."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher, LLParserLimits

from batchinfer.config import SamplingConfig
from batchinfer.data.grammar import HEADER, GrammarCompiler, load_ll_tokenizer
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.engine import Engine
from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.sequence import Grammar, Request, SamplingParams, TokenOutput
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, engine_with

TOKENIZER = Tokenizer.load(Path(__file__).resolve().parents[2] / "batchinfer" / "tiny" / "model")
VOCAB_SIZE = 4100  # four ids more than the tokenizer has
ENDS = [1, 0]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"type": "integer", "minimum": -9, "maximum": 99}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_pattern": " "},
    }
)
CHOICES = ["yes", "yes, and more", " no", "</s>", "möglich 🎉", "", "\n"]
REGEX = r"[a-f]{2,9}(-\d{1,2})?"
GRAMMARS = [SamplingConfig(json_schema=SCHEMA), SamplingConfig(regex=REGEX), SamplingConfig(choice=CHOICES), SamplingConfig()]
COMPILER = GrammarCompiler(TOKENIZER, VOCAB_SIZE, ENDS)


def satisfies(kind: int, text: str) -> bool:
    if kind == 0:
        value = json.loads(text)
        return list(value) == ["a", "b"] and len(value["a"]) <= 3 and type(value["b"]) is int and -9 <= value["b"] <= 99
    return bool(re.fullmatch(REGEX, text)) if kind == 1 else text in CHOICES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=ENDS)
    return folder


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> ModelRunner:
    config = config_for(checkpoint)
    shape = load_shape(config.model)
    assert set(shape.eos_token_ids) == set(ENDS)
    return build_runner(config, shape, TensorParallel(), CPU)


def request(number: int, grammar: Grammar | SamplingConfig | None, prompt_length: int = 6, **sampling: Any) -> Request:
    rng = random.Random(number)
    prompt = [rng.randrange(2, VOCAB_SIZE) for _ in range(prompt_length)]
    params = SamplingParams(**{"max_tokens": 60, **sampling})
    grammar = COMPILER.compile(grammar) if isinstance(grammar, SamplingConfig) else grammar
    return Request(number, prompt, params, rng.getrandbits(64), grammar)


def mixture(count: int = 32) -> list[Request]:
    """Requests of the four kinds in turn, sampled at temperature 1: from a random model, nearly evenly from what is allowed."""
    return [request(i, GRAMMARS[i % 4], 1 + i * 7 % 20, temperature=1.0) for i in range(count)]


def outcomes(engine: Engine, requests: list[Request]) -> dict[int, tuple[list[int], TokenOutput]]:
    """Tokens and last output of each request."""
    tokens: dict[int, list[int]] = {r.request_id: [] for r in requests}
    last: dict[int, TokenOutput] = {}
    for r in requests:
        engine.add(r)
    while engine.has_work():
        for output in engine.step()[0]:
            assert output.request_id not in last
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                last[output.request_id] = output
    return {number: (tokens[number], last[number]) for number in tokens}


def takes(matcher: LLMatcher, token: int) -> bool:
    """Whether the grammar takes this token next, found without any mask."""
    return matcher.is_accepting() if token in ENDS else matcher.validate_tokens([token]) == 1


def text_of(engine: Engine, one: Request) -> tuple[str, str | None]:
    ((tokens, last),) = outcomes(engine, [one]).values()
    return TOKENIZER.decode(tokens), last.finish_reason


def test_what_ends_by_itself_satisfies_its_grammar(runner: ModelRunner) -> None:
    finished = [0, 0, 0, 0]
    for number, (tokens, last) in outcomes(engine_with(runner, num_blocks=400), mixture(96)).items():
        kind = number % 4
        assert last.error is None
        finished[kind] += last.finish_reason == "stop"
        if kind < 3 and last.finish_reason == "stop":
            assert tokens[-1] in ENDS and not set(tokens[:-1]) & set(ENDS) and max(tokens) <= TOKENIZER.largest_id
            assert satisfies(kind, TOKENIZER.decode(tokens)), TOKENIZER.decode(tokens)
    assert min(finished[:3]) >= 20


def test_rows_without_a_grammar_are_not_changed_by_their_neighbours(runner: ModelRunner) -> None:
    together, _ = complete(engine_with(runner), mixture())
    alone, _ = complete(engine_with(runner), [r for r in mixture() if r.grammar is None])
    assert alone == {number: tokens for number, tokens in together.items() if number % 4 == 3}


@pytest.mark.parametrize(("num_blocks", "overlap"), [(200, True), (40, False), (40, True)])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_overlap_preemption_and_cached_prefixes_change_nothing(
    runner: ModelRunner, num_blocks: int, overlap: bool, prefix_caching: bool
) -> None:
    expected, _ = complete(engine_with(runner), mixture())
    engine = engine_with(runner, num_blocks=num_blocks, overlap=overlap, prefix_caching=prefix_caching)
    tokens, preempted = complete(engine, mixture())
    assert tokens == expected and (preempted > 0) == (num_blocks == 40)


def test_greedy_takes_the_likeliest_token_that_the_grammar_takes(checkpoint: Path, runner: ModelRunner) -> None:
    """Against a model of transformers and a matcher that is asked token by token, from the likeliest on."""
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    requests = [request(i, GRAMMARS[i % 3], max_tokens=12) for i in range(6)]
    completions, _ = complete(engine_with(runner), requests)
    for r in requests:
        assert r.grammar is not None
        matcher, expected = r.grammar.matcher.deep_copy(), list[int]()
        while len(expected) < 12 and not set(expected) & set(ENDS):
            with torch.inference_mode():
                logits = oracle(torch.tensor([r.prompt_token_ids + expected])).logits[0, -1]
            expected.append(next(token for token in logits.argsort(descending=True).tolist() if takes(matcher, token)))
            assert matcher.consume_token(expected[-1])
        assert completions[r.request_id] == expected


def test_the_end_comes_only_where_nothing_else_may(runner: ModelRunner) -> None:
    """ignore_eos and min_tokens keep it away, as long as the grammar leaves anything else."""
    for number in range(8):
        for sampling, shortest in (
            ({"ignore_eos": True}, 12),
            ({"min_tokens": 9}, 9),
            ({"ignore_eos": True, "min_tokens": 9}, 12),
        ):
            one = request(number, SamplingConfig(regex="a{0,12}"), temperature=1.0, **sampling)
            ((tokens, last),) = outcomes(engine_with(runner), [one]).values()
            text = TOKENIZER.decode(tokens)
            assert last.finish_reason == "stop" and tokens[-1] in ENDS and set(text) == {"a"}
            assert len(text) == 12 or (shortest == 9 and len(tokens) > 9)
    for sampling in ({"min_tokens": 50}, {"min_tokens": 50, "ignore_eos": True, "stop_token_ids": tuple(ENDS)}):
        text, reason = text_of(engine_with(runner), request(3, SamplingConfig(choice=["yes", "no"]), **sampling))
        assert text in ("yes", "no") and reason == "stop"


def test_other_ends_still_end(runner: ModelRunner) -> None:
    long = SamplingConfig(regex="[ab]{50}")
    assert text_of(engine_with(runner), request(1, long, max_tokens=7))[1] == "length"
    a, b = (TOKENIZER.encode_batch([letter], False)[0][0] for letter in "ab")
    text, reason = text_of(engine_with(runner), request(1, SamplingConfig(regex="a*b"), temperature=5.0, stop_token_ids=(b,)))
    assert reason == "stop" and re.fullmatch("a*b", text)
    engine = engine_with(runner, overlap=True)
    engine.add(request(1, long))
    engine.add(request(2, long, stop_token_ids=(a, b)))
    engine.step()
    engine.abort(1)
    while engine.has_work():
        assert all(output.request_id == 2 for output in engine.step()[0])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_that_cannot_be_followed_ends_its_row_alone(runner: ModelRunner, overlap: bool) -> None:
    """Beyond llguidance's limits in the middle of a completion, or where no token of the model goes on: an error, and no text."""
    tokens = load_ll_tokenizer(TOKENIZER, VOCAB_SIZE, ENDS)
    costly = LLMatcher(
        tokens,
        HEADER + r"start: /(?s:.*)(a|b)(?s:.{7})(c|d)(?s:.*)/",
        limits=LLParserLimits(step_lexer_fuel=2000, verbose_errors=False),
    )
    dead = LLMatcher(tokens, HEADER + "start: /ab[^\\s\\S]/", limits=LLParserLimits(verbose_errors=False))
    expected, _ = complete(engine_with(runner), mixture(8))
    some = mixture(8)
    some[2:2] = [
        request(100, Grammar(costly, VOCAB_SIZE), temperature=1.0),
        request(101, Grammar(dead, VOCAB_SIZE), temperature=1.0),
    ]
    result = outcomes(engine_with(runner, overlap=overlap), some)
    for number, words in ((100, "too many expressions"), (101, "NoExtension")):
        _, last = result.pop(number)
        assert last.finish_reason == "error" and words in str(last.error) and last.latency_s is not None
    assert {number: tokens for number, (tokens, _) in result.items()} == expected


def test_samples_of_one_row_share_the_grammar_and_not_its_state(runner: ModelRunner) -> None:
    first = request(0, SamplingConfig(regex=REGEX), temperature=1.0)
    several = [replace(first, request_id=i, seed=i) for i in range(6)]
    texts = {TOKENIZER.decode(tokens) for tokens, _ in outcomes(engine_with(runner), several).values()}
    assert len(texts) > 2 and all(satisfies(1, text) for text in texts)


def test_nothing_is_imported_until_a_grammar_is_asked_for() -> None:
    program = (
        "import sys; from batchinfer.config import *; from batchinfer.data.prompts import PromptBuilder;"
        "from batchinfer.worker import replica; PromptBuilder(Config(input=InputConfig(token_ids_column='t')), None, None, 9, 9);"
        "sys.exit('llguidance' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=120).returncode == 0
