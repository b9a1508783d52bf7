"""A completion that another engine had begun goes on as if there had been one engine, from every token on. In float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.engine.engine import Engine
from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.sequence import Request, SamplingParams, StepStats
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, engine_with, make_requests
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
    """Grammars, penalties, min_tokens, stop tokens, log-probabilities, greedy and drawn."""
    return mixed_requests(40)[:14]


@pytest.fixture(scope="module")
def whole(runner: ModelRunner, requests: list[Request]) -> dict[int, Told]:
    return run_mixture(engine_with(runner), requests)[0]


def begun(requests: list[Request], whole: dict[int, Told]) -> dict[int, tuple[Request, int]]:
    """Every request cut after each of its tokens but the last: new id -> what it came of, and after how many."""
    cuts = [(request, k) for request in requests for k in range(1, len(whole[request.request_id].token_ids))]
    return dict(enumerate(cuts))


@pytest.mark.parametrize(
    ("overlap", "prefix_caching", "num_blocks", "budget", "share"),
    [(True, True, 200, 64, 1), (False, False, 20, 8, 4), (True, False, 20, 20, 4)],
)
def test_it_goes_on_from_every_token(
    runner: ModelRunner,
    requests: list[Request],
    whole: dict[int, Told],
    overlap: bool,
    prefix_caching: bool,
    num_blocks: int,
    budget: int,
    share: int,
) -> None:
    cuts = dict(list(begun(requests, whole).items())[::share])
    assert share * len(cuts) > 60 and any(request.grammar and k > 2 for request, k in cuts.values())
    rest = [
        replace(request, request_id=number, completion_token_ids=whole[request.request_id].token_ids[:k])
        for number, (request, k) in cuts.items()
    ]
    engine = engine_with(runner, num_blocks, budget=budget, overlap=overlap, prefix_caching=prefix_caching)
    outcome, stats = run_mixture(engine, rest)
    for number, (request, k) in cuts.items():
        told, expected = outcome[number], whole[request.request_id]
        assert told.token_ids == expected.token_ids[k:], f"request {request.request_id} after {k} tokens"
        assert_near(told.logprobs, expected.logprobs and expected.logprobs[k:])
        assert told.prompt is None
    assert_counted(stats, rest, outcome)


def assert_counted(stats: list[StepStats], rest: list[Request], outcome: dict[int, Told]) -> None:
    """What was computed before is recomputed; only what is new is a token that came out."""
    assert sum(step.prefill_tokens + step.prefix_hit_tokens for step in stats) == 0
    assert sum(step.decode_tokens for step in stats) == sum(len(told.token_ids) for told in outcome.values())
    assert not any(step.ttft_s for step in stats)
    assert all(0 <= gap < 60 for step in stats for gap in step.inter_token_s)
    if not any(step.preempted for step in stats):
        known = sum(len(request.prompt_token_ids) + len(request.completion_token_ids) for request in rest)
        assert 0 < sum(step.recomputed_tokens for step in stats) <= known


def test_a_last_step_leaves_no_token_unread(runner: ModelRunner) -> None:
    """Stopped in the middle and gone on with elsewhere, every token is drawn once."""
    requests = make_requests(6, runner.shape.vocab_size, ignore_eos=True, temperature=0.8)
    expected, _ = complete(engine_with(runner), requests)
    for steps in (1, 3, 6):
        engine = engine_with(runner, overlap=True)
        found, drawn = stopped(engine, requests, steps)
        assert engine.in_flight is None
        rest = [
            replace(request, completion_token_ids=found[request.request_id])
            for request in requests
            if len(found[request.request_id]) < request.sampling.max_tokens
        ]
        then, _ = complete(engine_with(runner, overlap=True), rest)
        for number, tokens in then.items():
            drawn += len(tokens)
            found[number] = found[number] + tokens
        assert found == expected
        assert drawn == sum(map(len, expected.values()))


def stopped(engine: Engine, requests: list[Request], steps: int) -> tuple[dict[int, list[int]], int]:
    """Tokens of each request after so many steps, the last of which launches nothing ahead; and how many the steps counted."""
    found: dict[int, list[int]] = {request.request_id: [] for request in requests}
    drawn = 0
    for request in requests:
        engine.add(request)
    for step in range(steps):
        outputs, stats = engine.step(last=step == steps - 1)
        drawn += stats.decode_tokens
        for output in outputs:
            found[output.request_id] += output.token_ids
    return found, drawn


def test_a_completion_without_room_is_refused(runner: ModelRunner) -> None:
    request = Request(0, [1, 2], SamplingParams(max_tokens=3), 0, completion_token_ids=[4, 5, 6])
    with pytest.raises(ValueError, match="no more"):
        engine_with(runner).add(request)
