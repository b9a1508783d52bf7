"""Every op in plain torch: the specification that kernels are compared with, and what runs where there are none.

Exact in the sense that float64 input is computed in float64; half types accumulate in float32. Runs on CPU and CUDA, takes
strided views, and skips padding (slot -1, sequences without tokens). May read small index tensors back to the host.

Letters of shapes: T tokens of the step, S sequences, H query heads, K key-value heads, D head dimension, V vocabulary.
Attention over the paged cache is in `reference_attention.py`. What comes after the logits: `reference_penalties.py` for
masks and penalties, `reference_sampling.py` for drawing tokens, `reference_logprobs.py` for log-probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops.precision import accumulation_dtype
from batchinfer.ops.reference_attention import paged_attention
from batchinfer.ops.reference_logprobs import LogProbabilities, log_probabilities
from batchinfer.ops.reference_penalties import apply_penalties, apply_token_bitmask
from batchinfer.ops.reference_sampling import draw, greedy, sample

__all__ = [
    "LogProbabilities",
    "apply_penalties",
    "apply_token_bitmask",
    "draw",
    "embedding",
    "feed_tokens",
    "greedy",
    "log_probabilities",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_and_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.

    With `residual` (same shape) the sum x + residual is normed, and returned beside the result as the new residual.
    """
    if residual is not None:
        x = x + residual
    wide = accumulation_dtype(x.dtype)  # PyTorch's own would round to x.dtype before it multiplies with the weight
    y = torch.nn.functional.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
    return y if residual is None else (y, x)


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Turn q [T, H, D] and k [T, K, D] by their positions [T], store k and v [T, K, D], and return the turned q.

    Rotary embedding (Su et al. 2021) in the half-split form: element i pairs with i + D / 2. `cos_sin` [P, D] holds the
    cosines of each position, then its sines. The caches are [blocks, block_size, K, D]; slot s is place s % block_size of
    block s // block_size, and tokens with slot -1 are not stored.
    """
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    turned, keys = _rotate(torch.cat((q, k), dim=1), cos, sin).split((q.shape[1], k.shape[1]), dim=1)
    stored = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping.index_select(0, stored).long()
    place = (slots // k_cache.shape[1], slots % k_cache.shape[1])
    k_cache[place] = keys.index_select(0, stored)
    v_cache[place] = v.index_select(0, stored)
    return turned


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [T, 2I] = (gate, up): the gated MLP's activation. Returns [T, I]."""
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def embedding(token_ids: Tensor, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of weight [V, D] by token_ids [T]: row i is that of token start + i. Returns [T, D].

    Tokens outside of [start, stop) give zeros: a rank that holds a part of the vocabulary adds nothing for the others'.
    """
    stop = start + weight.shape[0] if stop is None else stop
    elsewhere = (token_ids < start) | (token_ids >= stop)
    rows = torch.nn.functional.embedding((token_ids - start).masked_fill(elsewhere, 0), weight)
    return rows.masked_fill(elsewhere.unsqueeze(-1), 0)


def feed_tokens(token_ids: Tensor, last_tokens: Tensor, slot_mapping: Tensor, token_cache: Tensor) -> Tensor:
    """Resolve token_ids [T] and store them at slot_mapping [T] of token_cache [places + 1]. Returns [T].

    An id below 0 stands for last_tokens[-1 - id], what was drawn in the step before. Slot -1 is not stored: the last place of
    the cache is nobody's, and may or may not be written. All are int32.
    """
    resolved = torch.where(token_ids < 0, last_tokens[(-1 - token_ids).clamp(min=0)], token_ids)
    token_cache[slot_mapping] = resolved
    return resolved
