"""The obvious twin of `batchinfer.engine.sampler`: from the parameters of each row instead of the arrays of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer import ops
from batchinfer.engine.sequence import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits: whose next token it is."""

    params: SamplingParams
    seed: int  # 64 bit, unsigned
    position: int  # index of the token to draw in prompt + completion
    num_completion_tokens: int  # drawn so far


def plain_sample_tokens(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: frozenset[int]) -> Tensor:
    """The next token of each row of logits [S, V]: [S] int64. Logits of tokens that may not come yet are overwritten."""
    _forbid_early_stops(logits, rows, eos_token_ids)

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)

    params = [row.params for row in rows]
    return ops.sample(
        logits,
        column([p.temperature for p in params], torch.float32),
        column([p.top_k for p in params], torch.int64),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
        column([as_signed(row.seed) for row in rows], torch.int64),
        column([row.position for row in rows], torch.int64),
    )


def as_signed(seed: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit seed."""
    return seed - 2**64 if seed >= 2**63 else seed


def _forbid_early_stops(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: frozenset[int]) -> None:
    """Rows below min_tokens draw no token that would end them."""
    places = [
        (index, token)
        for index, row in enumerate(rows)
        if row.num_completion_tokens < row.params.min_tokens
        for token in {*row.params.stop_token_ids, *(() if row.params.ignore_eos else eos_token_ids)}
        if token < logits.shape[1]
    ]
    if places:
        index, token = torch.tensor(places, device=logits.device).unbind(1)
        logits[index, token] = -torch.inf
