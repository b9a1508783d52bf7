"""All that an engine tells of its requests, gathered; and the kinds of sampling that make it tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from batchinfer.engine.engine import Engine
from batchinfer.engine.sequence import Request, TokenLogprobs, TokenOutput

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "chosen only": {"logprobs": 0, "temperature": 0.9},
    "prompt": {"prompt_logprobs": 2},
    "repetition": {"repetition_penalty": 1.7, "logprobs": 2},
    "below one": {"repetition_penalty": 0.6, "temperature": 0.7},
    "presence": {"presence_penalty": 0.8, "logprobs": 1},
    "frequency": {"frequency_penalty": 0.9, "prompt_logprobs": 0},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "temperature": 0.8,
        "top_k": 40,
        "logprobs": 5,
        "prompt_logprobs": 4,
    },
}


class Told:
    """What came out of the engine for one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None
        self.prompt: list[TokenLogprobs | None] | None = None

    def add(self, output: TokenOutput) -> None:
        if not self.token_ids:
            self.prompt = output.prompt_logprobs
            self.logprobs = None if output.logprobs is None else []
        else:
            assert output.prompt_logprobs is None
        self.token_ids += output.token_ids
        assert (output.logprobs is None) == (self.logprobs is None)
        if output.logprobs is not None and self.logprobs is not None:
            self.logprobs += output.logprobs


def run(engine: Engine, requests: list[Request]) -> list[Told]:
    told = {request.request_id: Told() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for output in engine.step()[0]:
            told[output.request_id].add(output)
    return [told[request.request_id] for request in requests]


def assert_near(told: Sequence[TokenLogprobs | None] | None, expected: Sequence[TokenLogprobs | None] | None) -> None:
    """The same tokens in the same order, to nine digits."""
    assert (told is None) == (expected is None)
    for ours, theirs in zip(told or [], expected or [], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None or theirs is None:
            continue
        assert (ours.token_id, ours.rank, [i for i, _ in ours.top]) == (theirs.token_id, theirs.rank, [i for i, _ in theirs.top])
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9, rel=0)
        assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-9, rel=0)
