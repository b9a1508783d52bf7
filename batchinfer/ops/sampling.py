"""Choosing tokens with the CUDA kernels of `csrc/sampling.cu`. The functions are those of `reference_sampling.py`.

No call waits for the device, whatever the rows ask for, and all can be captured in a CUDA graph. A call is a single launch.
Left to the reference: float64, and vocabularies of more than MOST_TOKENS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops import reference_sampling
from batchinfer.ops.compiled import load_kernels

MOST_TOKENS = 2**19  # of a vocabulary: a thread's share of a search must sum up in 32 bits


def greedy(logits: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
    """`reference_sampling.greedy`. splits: how many blocks share a row (1, 2, 4, 8; 0 chooses); it changes no result."""
    if logits.dtype == torch.float64:
        return reference_sampling.greedy(logits)
    load_kernels()
    logits = _dense(logits)
    token_ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    broken = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    torch.ops.batchinfer.greedy(token_ids, broken, logits, splits)
    return token_ids, broken


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference_sampling.draw`, up to near-ties: noise is computed in float32, and sums of probabilities in integers."""
    if logits.dtype == torch.float64 or logits.shape[1] > MOST_TOKENS:
        return reference_sampling.draw(logits, temperature, top_k, top_p, min_p, seeds, positions)
    load_kernels()
    logits = _dense(logits)
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    broken = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    torch.ops.batchinfer.sample(
        token_ids,
        broken,
        logits,
        _as(temperature, torch.float64),
        _as(top_k, torch.int32),
        _as(top_p, torch.float64),
        _as(min_p, torch.float64),
        _as(seeds, torch.int64),
        _as(positions, torch.int32),
        splits,
    )
    return token_ids, broken


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """`reference_sampling.sample`."""
    return draw(logits, temperature, top_k, top_p, min_p, seeds, positions)[0]


def _dense(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _as(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype).contiguous()
