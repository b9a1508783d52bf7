"""Log-probabilities of chosen and of likeliest tokens, in plain torch, without ever holding those of a whole batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchinfer.ops.precision import accumulation_dtype

CHUNK_ELEMENTS = 2**23  # logits worked on at once: temporaries take some 20 bytes for each


class LogProbabilities(NamedTuple):
    """Of N tokens and the k likeliest tokens in each one's place. Floats are float64 for float64 logits, else float32."""

    chosen: Tensor  # [N]
    ranks: Tensor  # [N] int64, 1 for the likeliest token; of equals the lower id ranks first
    top_ids: Tensor  # [N, k] int64, by rank
    top: Tensor  # [N, k]


def log_probabilities(logits: Tensor, token_ids: Tensor, k: int) -> LogProbabilities:
    """log_softmax of logits [N, V] at token_ids [N] and at each row's k likeliest tokens (at most V of them).

    Rank 1 is the token that argmax takes. A row with NaN gives NaN and spoils no other row.
    """
    size = max(1, CHUNK_ELEMENTS // logits.shape[1])
    chunks = zip(logits.split(size), token_ids.split(size), strict=True)
    parts = [_of_chunk(rows, chosen.long().unsqueeze(1), min(k, logits.shape[1])) for rows, chosen in chunks]
    return LogProbabilities(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _of_chunk(logits: Tensor, chosen: Tensor, k: int) -> LogProbabilities:
    """chosen is [m, 1]."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    shifted = wide - wide.amax(-1, keepdim=True)  # before the sum, or large logits would cost digits
    total = shifted.exp().sum(-1, keepdim=True).log()
    top_ids = likeliest(wide, k)
    score, ids = wide.gather(1, chosen), torch.arange(wide.shape[1], device=wide.device)
    before = (wide > score) | ((wide == score) & (ids < chosen))
    chosen_logprobs = (shifted.gather(1, chosen) - total).squeeze(1)
    return LogProbabilities(chosen_logprobs, 1 + before.sum(-1), top_ids, shifted.gather(1, top_ids) - total)


def likeliest(scores: Tensor, k: int) -> Tensor:
    """The ids [m, k] of the k highest of scores [m, V], highest first, of equals the lower ids.

    `topk` may take any of the equals at its border, so those are looked for again.
    """
    if k == 0:
        return torch.empty(len(scores), 0, dtype=torch.int64, device=scores.device)
    size = scores.shape[1]
    values, ids = scores.topk(k)
    border = values[:, -1:]
    all_ids = torch.arange(size, dtype=torch.int32, device=scores.device)
    equals = torch.where(scores == border, all_ids, size).topk(k, largest=False).values.long()  # `size` stands for none
    candidates = torch.cat((ids.masked_fill(values == border, size), equals), dim=1).sort(dim=-1).values
    found = scores.gather(1, candidates.clamp(max=size - 1)).masked_fill(candidates == size, -torch.inf)
    best = found.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return candidates.gather(1, best)
