"""Requests that all sample differently, through the whole engine: each token is the one that transformers' logits ask for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.sequence import Request, SamplingParams
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, engine_with
from tests.engine.plain_sampling import SamplingRow, plain_sample
from tests.model.oracle import widen

EOS = frozenset({2})


@pytest.fixture(scope="module")
def oracle_and_runner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelRunner]:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    oracle = widen(save_checkpoint(folder))
    config = config_for(folder)
    return oracle, build_runner(config, load_shape(config.model), TensorParallel(), CPU)


def mixed_requests(count: int, vocab_size: int) -> list[Request]:
    """Prompts of few different tokens, so that penalties have something to do."""
    rng = random.Random(3)

    def one_of(*values: Any) -> Any:
        return rng.choice(values)

    return [
        Request(
            i,
            rng.choices(range(0, vocab_size, 5), k=rng.randint(1, 30)),
            SamplingParams(
                temperature=one_of(0.0, 0.7, 1.6),
                top_p=one_of(1.0, 0.8),
                top_k=one_of(0, 20),
                min_p=one_of(0.0, 0.02),
                max_tokens=rng.randint(3, 20),
                min_tokens=rng.randint(0, 3),
                repetition_penalty=one_of(1.0, 1.2, 0.9),
                presence_penalty=one_of(0.0, 0.5),
                frequency_penalty=one_of(0.0, 0.4, -0.2),
            ),
            seed=rng.getrandbits(64),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
@pytest.mark.parametrize(("num_blocks", "budget"), [(200, 64), (24, 64), (200, 5)], ids=["roomy", "preempting", "chunked"])
def test_every_token_is_what_its_own_parameters_ask_for(
    oracle_and_runner: tuple[Any, ModelRunner], num_blocks: int, budget: int, overlap: bool
) -> None:
    oracle, runner = oracle_and_runner
    requests = mixed_requests(24, runner.shape.vocab_size)
    engine = engine_with(runner, num_blocks=num_blocks, max_num_seqs=10, budget=budget, overlap=overlap)
    completions, preempted = complete(engine, requests)
    assert (preempted > 0) == (num_blocks == 24)
    for request in requests:
        prompt, completion = request.prompt_token_ids, completions[request.request_id]
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :].tolist()
        for i, token in enumerate(completion):
            row = SamplingRow(request.sampling, request.seed, prompt, completion[:i])
            assert plain_sample(logits[i], row, EOS) == token


def test_repetition_penalty_generates_what_transformers_generates(oracle_and_runner: tuple[Any, ModelRunner]) -> None:
    oracle, runner = oracle_and_runner
    params = SamplingParams(repetition_penalty=1.4, max_tokens=16, ignore_eos=True)
    requests = [Request(i, r.prompt_token_ids, params, 0) for i, r in enumerate(mixed_requests(12, runner.shape.vocab_size))]
    completions, _ = complete(engine_with(runner), requests)
    plain, _ = complete(engine_with(runner), [Request(r.request_id, r.prompt_token_ids, SamplingParams(), 0) for r in requests])
    assert completions != {i: tokens[:16] for i, tokens in plain.items()}
    for request in requests:
        prompt = torch.tensor([request.prompt_token_ids])
        whole = oracle.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=1.4,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert completions[request.request_id] == whole[0, prompt.shape[1] :].tolist()
