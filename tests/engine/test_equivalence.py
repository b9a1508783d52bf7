"""However the work is cut, the tokens are the same: exact, because the arithmetic is float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.sequence import Request, TokenOutput
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, engine_with, make_requests

GREEDY = {"ignore_eos": True}
SAMPLED = {"ignore_eos": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> ModelRunner:
    config = config_for(checkpoint)
    return build_runner(config, load_shape(config.model), TensorParallel(), CPU)


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def requests(request: pytest.FixtureRequest, runner: ModelRunner) -> list[Request]:
    return make_requests(24, runner.shape.vocab_size, **request.param)


@pytest.fixture(scope="module")
def one_by_one(runner: ModelRunner, requests: list[Request]) -> dict[int, list[int]]:
    """Each request alone, its prompt in one piece."""
    engine = engine_with(runner, budget=64)
    completions = {request.request_id: complete(engine, [request])[0][request.request_id] for request in requests}
    assert all(len(completions[r.request_id]) == r.sampling.max_tokens for r in requests)
    return completions


def test_continuous_batching_equals_one_by_one(
    runner: ModelRunner, requests: list[Request], one_by_one: dict[int, list[int]]
) -> None:
    assert complete(engine_with(runner, max_num_seqs=16, budget=64), requests)[0] == one_by_one


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_chunked_prefill_equals_whole(
    runner: ModelRunner, requests: list[Request], one_by_one: dict[int, list[int]], budget: int
) -> None:
    some = requests[:8]
    assert complete(engine_with(runner, budget=budget), some)[0] == {r.request_id: one_by_one[r.request_id] for r in some}


def test_preemption_changes_nothing(runner: ModelRunner, requests: list[Request], one_by_one: dict[int, list[int]]) -> None:
    completions, preempted = complete(engine_with(runner, num_blocks=24, budget=64), requests)
    assert preempted > 3
    assert completions == one_by_one


@pytest.mark.parametrize("num_blocks", [200, 24])
def test_a_shared_prefix_changes_nothing(
    runner: ModelRunner, requests: list[Request], one_by_one: dict[int, list[int]], num_blocks: int
) -> None:
    """The requests twice, so that the second ones find the blocks of the first."""
    again = [replace(request, request_id=100 + request.request_id) for request in requests]
    engine = engine_with(runner, num_blocks=num_blocks, budget=64, prefix_caching=True)
    completions, hits = {}, 0
    for request in [r for pair in zip(requests, again, strict=True) for r in pair]:
        engine.add(request)
    while engine.has_work():
        outputs, stats = engine.step()
        hits += stats.prefix_hit_tokens
        for output in outputs:
            completions.setdefault(output.request_id, []).extend(output.token_ids)
    assert completions == one_by_one | {100 + i: tokens for i, tokens in one_by_one.items()}
    assert hits > 200


@pytest.mark.parametrize("num_blocks", [200, 24])
def test_overlap_equals_stepping_in_turn(
    runner: ModelRunner, requests: list[Request], one_by_one: dict[int, list[int]], num_blocks: int
) -> None:
    engine = engine_with(runner, num_blocks=num_blocks, max_num_seqs=6, budget=20, overlap=True)
    completions, preempted = complete(engine, requests)
    assert completions == one_by_one and (preempted > 0) == (num_blocks == 24)


def test_greedy_tokens_equal_those_of_transformers(checkpoint: Path, runner: ModelRunner) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    requests = make_requests(24, runner.shape.vocab_size, ignore_eos=True)
    completions, _ = complete(engine_with(runner), requests)
    for request in requests:
        prompt = torch.tensor([request.prompt_token_ids])
        new = request.sampling.max_tokens
        whole = oracle.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert completions[request.request_id] == whole[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("ahead", [{}, {"prefix_caching": True, "overlap": True}], ids=["in turn", "overlapped"])
def test_a_row_that_overflows_says_so_and_spoils_no_other(checkpoint: Path, ahead: dict[str, bool]) -> None:
    """Neither those beside it nor those that get its blocks: one token of the vocabulary is infinite, one row has it."""
    config = config_for(checkpoint)
    runner = build_runner(config, load_shape(config.model), TensorParallel(), CPU)
    requests = make_requests(12, 50, **SAMPLED)
    expected, _ = complete(engine_with(runner), requests)
    runner.model.embed_tokens.weight[90] = torch.inf
    bad = Request(99, [1, 90, 3, 4, 5, 6, 7, 8, 9], replace(requests[0].sampling, max_tokens=20), seed=1)
    assert not any(90 in tokens for tokens in expected.values())
    engine = engine_with(runner, num_blocks=40, **ahead)
    for request in (bad, *requests):
        engine.add(request)
    outputs: dict[int, list[TokenOutput]] = {request.request_id: [] for request in (bad, *requests)}
    while engine.has_work():
        for output in engine.step()[0]:
            outputs[output.request_id].append(output)
    assert [(o.token_ids, o.finish_reason, o.error and o.error[0]) for o in outputs.pop(99)] == [([], "error", "bad_logits")]
    assert {i: [token for output in row for token in output.token_ids] for i, row in outputs.items()} == expected


def test_min_tokens_keeps_the_end_away(runner: ModelRunner) -> None:
    """With every token but one, and one id beyond the vocabulary, as a stop, that one comes until there are enough."""
    stops = tuple(i for i in range(runner.shape.vocab_size + 1) if i != 11)
    requests = make_requests(6, runner.shape.vocab_size, min_tokens=3, max_tokens=9, stop_token_ids=stops, ignore_eos=True)
    for tokens in complete(engine_with(runner), requests)[0].values():
        assert tokens[:3] == [11] * 3 and (tokens[-1] != 11 or len(tokens) == 9)
