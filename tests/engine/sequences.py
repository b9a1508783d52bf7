"""Sequences for the engine's tests, in one call."""

from __future__ import annotations

from batchinfer.engine.sequence import Request, SamplingParams, Sequence


def sequence_of(request_id: int, token_ids: list[int], seed: int = 0, **sampling: object) -> Sequence:
    params = SamplingParams(**{"max_tokens": 8, **sampling})  # type: ignore[arg-type]
    return Sequence.from_request(Request(request_id, token_ids, params, seed), now=0.0, max_model_len=1 << 20)


def make_sequence(request_id: int, prompt: int, max_tokens: int = 8) -> Sequence:
    """A sequence of `prompt` tokens that differ from those of every other id."""
    return sequence_of(
        request_id, [(request_id * 7919 + i) % 1000 for i in range(prompt)], seed=request_id, max_tokens=max_tokens
    )
