"""Log-probabilities with the CUDA kernel of `csrc/logprobs.cu`: `reference_logprobs.log_probabilities` in a single launch.

Left to the reference: float64, more than MOST_LIKELIEST tokens, and vocabularies that the search does not take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops import reference_logprobs
from batchinfer.ops.compiled import load_kernels
from batchinfer.ops.reference_logprobs import LogProbabilities
from batchinfer.ops.sampling import MOST_TOKENS

MOST_LIKELIEST = 1024  # kMostLikeliest of csrc/logprobs.h


def log_probabilities(logits: Tensor, token_ids: Tensor, k: int, splits: int = 0) -> LogProbabilities:
    """splits: how many blocks share a row (1, 2, 4, 8; 0 chooses); it changes no result. Of a row with NaN only NaN is told."""
    rows, k = len(logits), min(k, logits.shape[1])
    if logits.dtype == torch.float64 or k > MOST_LIKELIEST or logits.shape[1] > MOST_TOKENS:
        return reference_logprobs.log_probabilities(logits, token_ids, k)
    load_kernels()
    if logits.stride(1) != 1 and logits.shape[1] != 1:
        logits = logits.contiguous()
    told = LogProbabilities(
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.int64, device=logits.device),
        torch.empty(rows, k, dtype=torch.int64, device=logits.device),
        torch.empty(rows, k, dtype=torch.float32, device=logits.device),
    )
    torch.ops.batchinfer.log_probabilities(*told, logits, token_ids.long().contiguous(), splits)
    return told
