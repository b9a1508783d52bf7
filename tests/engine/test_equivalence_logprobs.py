"""Penalties and log-probabilities through the whole engine, against transformers, however the work is cut. Exact in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.sequence import Request, TokenLogprobs
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, config_for, engine_with, make_requests
from tests.engine.told import KINDS, Told, assert_near, run
from tests.model.oracle import widen

WAYS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1, "budget": 64},
    "all at once": {"max_num_seqs": 30, "budget": 400},
    "small chunks": {"budget": 3},
    "preempted": {"num_blocks": 24, "budget": 64},
    "prefix cache": {"prefix_caching": True},
    "overlap": {"overlap": True},
    "everything": {"num_blocks": 24, "budget": 20, "prefix_caching": True, "overlap": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> ModelRunner:
    config = config_for(checkpoint)
    return build_runner(config, load_shape(config.model), TensorParallel(), CPU)


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return widen(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64))


@pytest.fixture(scope="module")
def requests(runner: ModelRunner) -> list[Request]:
    """Every kind with three ragged prompts, the third of each kind the same for all: they share a prefix."""
    made = []
    for kind in KINDS.values():
        some = make_requests(3, runner.shape.vocab_size, ignore_eos=True, **kind)
        common = [5, 9, 5, 44, 9, 9, 61, 5, 5, 2, 17]
        made += [(some[0], some[0].prompt_token_ids), (some[1], some[1].prompt_token_ids), (some[2], common)]
    return [Request(i, prompt, request.sampling, request.seed) for i, (request, prompt) in enumerate(made)]


@pytest.fixture(scope="module")
def by_oracle(oracle: Any, runner: ModelRunner, requests: list[Request]) -> list[Told]:
    """One by one with the obvious formulas over transformers' logits; random draws are taken from the engine run alone."""
    engine = engine_with(runner, max_num_seqs=1, budget=64)
    return [expected(oracle, request, run(engine, [request])[0].token_ids) for request in requests]


def expected(oracle: Any, request: Request, drawn: list[int]) -> Told:
    tokens, sampling = list(request.prompt_token_ids), request.sampling
    told = Told()
    told.logprobs = None if sampling.logprobs is None else []
    for i in range(sampling.max_tokens):
        with torch.no_grad():
            logits = oracle(torch.tensor([tokens]), use_cache=False).logits[0]
        if i == 0 and sampling.prompt_logprobs is not None:
            told.prompt = [None, *tell(logits[:-1], tokens[1:], sampling.prompt_logprobs)]
        token = penalised(logits[-1].clone(), tokens, i, request).argmax().item() if sampling.temperature == 0 else drawn[i]
        if told.logprobs is not None:
            told.logprobs += tell(logits[-1:], [token], sampling.logprobs or 0)
        tokens.append(token)
        told.token_ids.append(token)
    return told


def penalised(logits: torch.Tensor, tokens: list[int], completed: int, request: Request) -> torch.Tensor:
    from transformers import RepetitionPenaltyLogitsProcessor

    sampling = request.sampling
    processor = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    logits = processor(torch.tensor([tokens]), logits.unsqueeze(0))[0]
    for token, count in Counter(tokens[len(tokens) - completed :]).items():
        logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    return logits


def tell(logits: torch.Tensor, targets: list[int], k: int) -> Iterator[TokenLogprobs]:
    for row, target in zip(logits.log_softmax(-1), targets, strict=True):
        top = row.topk(k)
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        yield TokenLogprobs(target, row[target].item(), int((row > row[target]).sum()) + 1, pairs)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_and_log_probabilities_are_those_of_transformers(
    runner: ModelRunner, requests: list[Request], by_oracle: list[Told], way: str
) -> None:
    for ours, theirs in zip(run(engine_with(runner, **WAYS[way]), requests), by_oracle, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert_near(ours.logprobs, theirs.logprobs)
        assert_near(ours.prompt, theirs.prompt)


def test_penalties_change_what_is_drawn(runner: ModelRunner, requests: list[Request], by_oracle: list[Told]) -> None:
    """The test above would mean little if they did not."""
    plain = {tuple(r.prompt_token_ids): t.token_ids for r, t in zip(requests[:3], by_oracle[:3], strict=True)}
    for number, kind in enumerate(KINDS):
        if kind in ("repetition", "presence", "frequency"):
            changed = [by_oracle[3 * number + i].token_ids != plain[tuple(requests[i].prompt_token_ids)] for i in range(3)]
            assert any(changed), kind


def test_what_was_told_of_a_prompt_is_not_kept(runner: ModelRunner) -> None:
    """It is hundreds of bytes a token, and the completion may take long."""
    engine = engine_with(runner)
    request = make_requests(2, runner.shape.vocab_size, ignore_eos=True, prompt_logprobs=2)[1]
    engine.add(request)
    (output,), _ = engine.step()
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(request.prompt_token_ids) > 2
    assert not engine.sequences[request.request_id].prompt_logprobs
