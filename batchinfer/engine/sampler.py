"""Which tokens may be drawn, and the cheapest way to draw them: the policy between the model's logits and the ops.

What a step needs is decided on the host, from the batch's own arrays: a batch that asks for nothing pays for nothing, and
no decision waits for the device. The counter of a row's random numbers is the index that the drawn token will have in its
sequence (prompt and completion), so neither preemption nor resumption changes a draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchinfer import ops
from batchinfer.engine.batch import Batch, BatchArrays, to_device


@dataclass(frozen=True, slots=True, eq=False)
class TokenMask:
    """What structured output allows M of the N rows, on the host: bit t % 32 of word t // 32 says that token t may come."""

    rows: np.ndarray  # [M]
    bitmask: np.ndarray  # [M, W] int32, 0 beyond the vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """What a step drew, on the device."""

    token_ids: Tensor  # [N] int32 or int64
    broken: Tensor  # [N] bool: the row's logits are no numbers, so its token means nothing
    logprobs: ops.LogProbabilities | None  # of the rows with num_logprobs >= 0, in order, for the largest k among them


def sample_tokens(
    logits: Tensor, batch: Batch, step: BatchArrays[Tensor], token_cache: Tensor, mask: TokenMask | None = None
) -> SampledTokens:
    """Draw the next token of each row of logits [N, V], which are overwritten where something changes them.

    `step` is `batch` on the logits' device, token_cache [blocks, block_size] the ids of the tokens in the KV cache's slots.
    Masks come first, then min_tokens, then penalties. Log-probabilities are those of the logits as they were given.
    """
    forbidden = batch.forbidden[batch.forbidden[:, 1] < logits.shape[1]]  # a stop token id may be no token of this model
    if mask is not None:
        mask, forbidden = forbid_in_mask(mask, forbidden)
    (penalised,) = np.nonzero((batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0))
    (asking,) = np.nonzero(batch.num_logprobs >= 0)
    raw = logits
    if len(asking) and (mask is not None or len(forbidden) or len(penalised) or len(asking) < len(logits)):
        raw = logits[_on_device(asking, logits)]
    if mask is not None:
        ops.apply_token_bitmask(logits, _on_device(mask.rows, logits), to_device(mask.bitmask, logits.device))
    if len(forbidden):
        row, token = _on_device(forbidden, logits).unbind(1)
        logits[row, token] = logits.new_full((), -torch.inf)  # a number would come from the host, and make it wait
    if len(penalised):
        _penalise(logits, _on_device(penalised, logits), step, token_cache)
    token_ids, broken = _draw(logits, step) if batch.temperature.any() else ops.greedy(logits)
    told = None
    if len(asking):
        chosen = token_ids if len(asking) == len(token_ids) else token_ids[_on_device(asking, logits)]
        told = ops.log_probabilities(raw, chosen, int(batch.num_logprobs.max()))
    return SampledTokens(token_ids, broken, told)


def forbid_in_mask(mask: TokenMask, forbidden: np.ndarray) -> tuple[TokenMask, np.ndarray]:
    """Move forbidden pairs [F, 2] (row, token id) of masked rows into the mask. Returns the new mask and the other pairs.

    Where a row's mask allows only forbidden tokens it wins: what can only end must end, whatever its min_tokens.
    """
    masked = np.isin(forbidden[:, 0], mask.rows)
    if not masked.any():
        return mask, forbidden
    bitmask = mask.bitmask.copy()
    for row in np.unique(forbidden[masked, 0]):
        (index,) = np.flatnonzero(mask.rows == row)
        tokens = forbidden[forbidden[:, 0] == row, 1]
        words = bitmask[index].copy()
        tokens = tokens[tokens // 32 < len(words)]
        np.bitwise_and.at(words, tokens // 32, ~(np.int32(1) << (tokens % 32).astype(np.int32)))
        if words.any():
            bitmask[index] = words
    return TokenMask(mask.rows, bitmask), forbidden[~masked]


def _penalise(logits: Tensor, rows: Tensor, step: BatchArrays[Tensor], token_cache: Tensor) -> None:
    ops.apply_penalties(
        logits,
        rows,
        token_cache,
        step.block_tables,
        step.context_lens,
        step.sample_seqs,
        step.prompt_lens,
        step.repetition_penalty,
        step.presence_penalty,
        step.frequency_penalty,
    )


def _draw(logits: Tensor, step: BatchArrays[Tensor]) -> tuple[Tensor, Tensor]:
    return ops.draw(logits, step.temperature, step.top_k, step.top_p, step.min_p, step.seeds, step.sample_positions)


def _on_device(indices: np.ndarray, like: Tensor) -> Tensor:
    """Indices as int64 beside `like`."""
    return to_device(indices.astype(np.int64, copy=False), like.device)
