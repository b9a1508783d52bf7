"""Everything at once changes nothing: whatever else is in the batch, a request is told what it is told alone. In float64."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.sequence import Request
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, config_for, engine_with
from tests.engine.mixtures import MODEL, mixed_requests, run_mixture
from tests.engine.told import Told, assert_near


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, **MODEL)
    config = config_for(folder)
    return build_runner(config, load_shape(config.model), TensorParallel(), CPU)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return mixed_requests(40)


@pytest.fixture(scope="module")
def alone(runner: ModelRunner, requests: list[Request]) -> dict[int, Told]:
    engine = engine_with(runner, max_num_seqs=1, budget=64)
    return {request.request_id: run_mixture(engine, [request])[0][request.request_id] for request in requests}


@pytest.mark.parametrize("seed", range(12))
def test_a_request_is_told_what_it_is_told_alone(
    runner: ModelRunner, requests: list[Request], alone: dict[int, Told], seed: int
) -> None:
    rng = random.Random(seed)
    some = rng.sample(requests, 30)
    stop_after = {request.request_id: rng.choice([0, 1, 3]) for request in some[::4]}
    engine = engine_with(
        runner,
        num_blocks=20 if seed % 3 else 200,
        max_num_seqs=rng.choice([4, 8]),
        budget=rng.choice([8, 20, 64]),
        overlap=seed % 2 == 0,
        prefix_caching=rng.random() < 0.7,
    )
    outcome, stats = run_mixture(engine, some, stop_after, seed)
    for number, told in outcome.items():
        count = len(told.token_ids)
        assert told.token_ids == alone[number].token_ids[:count]
        assert number in stop_after or count == len(alone[number].token_ids)
        if count:  # else it was aborted before it was told anything
            assert_near(told.logprobs, alone[number].logprobs and alone[number].logprobs[:count])
            assert_near(told.prompt, alone[number].prompt)
    assert (sum(step.preempted for step in stats) > 0) == (engine.scheduler.blocks.num_blocks == 20)
    assert (sum(step.prefix_hit_tokens for step in stats) > 0) == engine.scheduler.blocks.prefix_caching
    assert not engine.sequences and not engine.builder.rows and engine.scheduler.blocks.num_used_blocks == 0
