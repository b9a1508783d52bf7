"""A step that the device has no memory for: the engine goes on with smaller ones, and every token stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchinfer.engine.batch import Batch
from batchinfer.engine.engine import Engine
from batchinfer.engine.model_runner import Forward, ModelRunner, build_runner
from batchinfer.engine.sequence import Request
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, engine_with, make_requests


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    config = config_for(folder)
    return build_runner(config, load_shape(config.model), TensorParallel(), CPU)


def limit_memory(engine: Engine, max_tokens: int, from_step: int = 0) -> list[int]:
    """Let every step of more tokens fail, in turn before and after it has written to the cache. Returns those that failed."""
    forward, failed, steps = engine.runner.forward, [], []

    def limited(batch: Batch) -> Forward:
        steps.append(batch.num_tokens)
        if batch.num_tokens <= max_tokens or len(steps) <= from_step:
            return forward(batch)  # type: ignore[no-any-return]
        failed.append(batch.num_tokens)
        if len(failed) % 2 == 0:
            forward(batch)
        raise torch.OutOfMemoryError("out of memory")

    engine.runner.forward = limited  # type: ignore[method-assign]
    return failed


def alike(requests: list[Request]) -> list[Request]:
    """The same requests behind a beginning that they share."""
    return [Request(r.request_id, [3] * 21 + r.prompt_token_ids, r.sampling, r.seed) for r in requests]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize(("max_tokens", "from_step"), [(20, 0), (9, 3), (3, 0), (3, 6), (1, 8)])
def test_tokens_stay_the_same(runner: ModelRunner, overlap: bool, prefix_caching: bool, max_tokens: int, from_step: int) -> None:
    requests = alike(make_requests(12, 64, ignore_eos=True))
    expected, _ = complete(engine_with(runner), requests)
    engine = engine_with(runner, overlap=overlap, prefix_caching=prefix_caching)
    failed = limit_memory(engine, max_tokens, from_step)
    assert complete(engine, requests)[0] == expected
    assert failed and engine.scheduler.max_num_batched_tokens <= max(failed) // 2


def test_blocks_that_were_never_filled_are_not_found_again(runner: ModelRunner) -> None:
    engine = engine_with(runner, prefix_caching=True)
    limit_memory(engine, 16)
    requests = alike(make_requests(6, 64))
    for request in requests:
        engine.add(request)
    engine.step()
    engine.scheduler.check_invariants()


def test_a_step_of_one_token_that_does_not_fit_is_an_error(runner: ModelRunner) -> None:
    engine = engine_with(runner)
    limit_memory(engine, 0)
    engine.add(make_requests(1, 64)[0])
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
