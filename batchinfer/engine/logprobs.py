"""Log-probabilities on their way out: of prompts, in bounded memory, and from tensors to what a `TokenOutput` carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from batchinfer import ops
from batchinfer.engine.sequence import TokenLogprobs

CHUNK_ELEMENTS = 2**23  # logits projected at once


def prompt_log_probabilities(
    project: Callable[[Tensor], Tensor], hidden: Tensor, rows: Tensor, targets: Tensor, k: int, vocab_size: int
) -> ops.LogProbabilities:
    """Log-probabilities of targets [P] at the positions rows [P] of hidden [T, hidden_size]: `ops.log_probabilities` of them.

    The vocabulary is projected a few positions at a time, so memory does not grow with prompts.

    `project` is the model's `logits`, a collective: every rank calls this with the same P and vocab_size, which alone decide
    how often it projects. Ranks that do not need the result lose no time, since the others wait for them at the next one.
    """
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    chunks = zip(rows.split(size), targets.split(size), strict=True)
    parts = [ops.log_probabilities(project(hidden.index_select(0, at)), target, k) for at, target in chunks]
    return ops.LogProbabilities(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def token_logprobs(told: ops.LogProbabilities, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """What was told, on the host, of token_ids [M]: for each the likeliest counts [M] tokens of those that are there."""
    chosen, ranks, top_ids, top = (tensor.tolist() for tensor in told)
    return [
        TokenLogprobs(token_id, chosen[i], ranks[i], list(zip(top_ids[i][:count], top[i][:count], strict=True)))
        for i, (token_id, count) in enumerate(zip(token_ids, counts, strict=True))
    ]
