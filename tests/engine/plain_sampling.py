"""The obvious twin of `batchinfer.engine.sampler`: one row, one token at a time, in Python's floats."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from batchinfer.engine.sequence import SamplingParams, TokenLogprobs
from batchinfer.ops.reference_sampling import gumbel_noise


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits: whose next token it is."""

    params: SamplingParams
    seed: int  # 64 bit, unsigned
    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    allowed: frozenset[int] | None = None  # by structured output; None: everything


def plain_sample(logits: list[float], row: SamplingRow, eos_token_ids: frozenset[int]) -> int:
    """The next token of a row of logits."""
    scores = penalised(logits, row)
    scores = {token: scores[token] for token in candidates(len(logits), row, eos_token_ids)}
    best = max(scores.values())
    if row.params.temperature == 0:
        return min(token for token, score in scores.items() if score == best)
    scores = filtered({token: (score - best) / row.params.temperature for token, score in scores.items()}, row.params)
    seed = row.seed - 2**64 if row.seed >= 2**63 else row.seed
    position = len(row.prompt) + len(row.completion)
    (noise,) = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), len(logits)).tolist()
    return max(scores, key=lambda token: (scores[token] + noise[token], -token))


def candidates(vocab_size: int, row: SamplingRow, eos_token_ids: frozenset[int]) -> set[int]:
    """What may come: not the end before min_tokens, unless structured output leaves nothing else."""
    allowed = {token for token in range(vocab_size) if row.allowed is None or token in row.allowed}
    if len(row.completion) >= row.params.min_tokens:
        return allowed
    ends = set(row.params.stop_token_ids) | (set() if row.params.ignore_eos else eos_token_ids)
    return allowed - ends or allowed


def penalised(logits: list[float], row: SamplingRow) -> list[float]:
    result = []
    for token, logit in enumerate(logits):
        if token in row.prompt or token in row.completion:
            penalty = row.params.repetition_penalty
            logit = logit * penalty if logit < 0 else logit / penalty
        count = row.completion.count(token)
        result.append(logit - row.params.frequency_penalty * count - row.params.presence_penalty * (count > 0))
    return result


def filtered(scores: dict[int, float], params: SamplingParams) -> dict[int, float]:
    """What top-k, then top-p, then min-p leave of scores that a temperature has divided."""
    order = sorted(scores, key=lambda token: (-scores[token], token))
    if params.top_k:
        border = scores[order[: params.top_k][-1]]
        order = [token for token in order if scores[token] >= border]
    total = math.fsum(math.exp(scores[token]) for token in order)
    kept: list[int] = []
    before = 0.0
    for token in order:
        probability = math.exp(scores[token]) / total
        if kept and (before >= params.top_p or probability < params.min_p * math.exp(scores[order[0]]) / total):
            break
        kept.append(token)
        before += probability
    return {token: scores[token] for token in kept}


def plain_logprobs(logits: list[float], token_id: int, k: int) -> TokenLogprobs:
    """Of a token, with the k likeliest."""
    best = max(logits)
    total = best + math.log(math.fsum(math.exp(logit - best) for logit in logits))
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    top = [(token, logits[token] - total) for token in order[:k]]
    return TokenLogprobs(token_id, logits[token_id] - total, 1 + order.index(token_id), top)
