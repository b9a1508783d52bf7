"""Log-probabilities of prompts: the vocabulary is projected a few positions at a time, so memory does not grow with prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchinfer import ops

CHUNK_ELEMENTS = 2**23  # logits projected at once


def prompt_log_probabilities(
    project: Callable[[Tensor], Tensor], hidden: Tensor, rows: Tensor, targets: Tensor, k: int, vocab_size: int
) -> ops.LogProbabilities:
    """Log-probabilities of targets [P] at the positions rows [P] of hidden [T, hidden_size]: `ops.log_probabilities` of them.

    `project` is the model's `logits`, a collective: every rank calls this with the same P and vocab_size, which alone decide
    how often it projects. Ranks that do not need the result lose no time, since the others wait for them at the next one.
    """
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    chunks = zip(rows.split(size), targets.split(size), strict=True)
    parts = [ops.log_probabilities(project(hidden.index_select(0, at)), target, k) for at, target in chunks]
    return ops.LogProbabilities(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
