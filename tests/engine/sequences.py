"""Sequences for the engine's tests, in one call."""

from __future__ import annotations

from batchinfer.engine.sequence import Request, SamplingParams, Sequence


def make_sequence(request_id: int, prompt: int, max_tokens: int = 8) -> Sequence:
    """A sequence of `prompt` tokens that differ from those of every other id."""
    token_ids = [(request_id * 7919 + i) % 1000 for i in range(prompt)]
    request = Request(request_id, token_ids, SamplingParams(max_tokens=max_tokens), seed=request_id)
    return Sequence.from_request(request, now=0.0, max_model_len=1 << 20)
