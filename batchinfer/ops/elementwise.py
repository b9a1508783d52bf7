"""The memory-bound ops on a GPU: norm, rotary embedding, activation, embedding. `reference.py` specifies what they compute.

What the kernels take, decided from devices, element types and shapes alone; all else is computed by the reference:

| op | kernels take |
|---|---|
| all | CUDA tensors of float32, float16 or bfloat16, all of one type (`embedding`: any type of 2 bytes or more) |
| `rms_norm` | rows of up to 32,768 elements of a half type, 16,384 of float32; the last dimension dense, at most two before it |
| `rope_and_cache` | any even head size; `cos_sin` float32 and contiguous; the last dimension of all others dense |
| `silu_and_mul` | the last dimension dense |
| `embedding`, `feed_tokens` | int32 ids and slots, contiguous |

Rows that begin and end on 16 bytes are read 16 bytes at a time, others element by element: slower, and right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops import reference
from batchinfer.ops.compiled import load_kernels

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_NORM_ELEMENTS = {torch.float32: 16_384, torch.float16: 32_768, torch.bfloat16: 32_768}


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.rms_norm`; neither `x` nor `residual` is overwritten."""
    given = (x, weight) if residual is None else (x, weight, residual)
    fits = x.dim() <= 3 and x.shape[-1] <= _NORM_ELEMENTS.get(x.dtype, 0) and (residual is None or residual.shape == x.shape)
    if not (fits and _alike(*given)):
        return reference.rms_norm(x, weight, eps, residual)
    load_kernels()
    y = _like(x)
    total = None if residual is None else _like(x)
    torch.ops.batchinfer.rms_norm(y, x, weight, eps, residual, total)
    return y if total is None else (y, total)


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
    """`reference.rope_and_cache`."""
    table = cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    if not (table and _alike(q, k, v, k_cache, v_cache)):
        return reference.rope_and_cache(q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping)
    load_kernels()
    out = _like(q)
    torch.ops.batchinfer.rope_and_cache(out, q, k, v, cos_sin, positions.int(), k_cache, v_cache, slot_mapping.int())
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`reference.silu_and_mul`."""
    if not (gate_up.dim() == 2 and _alike(gate_up)):
        return reference.silu_and_mul(gate_up)
    load_kernels()
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    torch.ops.batchinfer.silu_and_mul(out, gate_up)
    return out


def embedding(token_ids: Tensor, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """`reference.embedding`."""
    if not (_indices(token_ids) and weight.is_cuda and weight.stride(-1) == 1 and weight.element_size() > 1):
        return reference.embedding(token_ids, weight, start, stop)
    load_kernels()
    out = torch.empty(token_ids.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    torch.ops.batchinfer.embedding(out, token_ids, weight, start, start + weight.shape[0] if stop is None else stop)
    return out


def feed_tokens(token_ids: Tensor, last_tokens: Tensor, slot_mapping: Tensor, token_cache: Tensor) -> Tensor:
    """`reference.feed_tokens`."""
    if not _indices(token_ids, last_tokens, slot_mapping, token_cache):
        return reference.feed_tokens(token_ids, last_tokens, slot_mapping, token_cache)
    load_kernels()
    resolved = torch.empty_like(token_ids)
    torch.ops.batchinfer.feed_tokens(resolved, token_ids, last_tokens, slot_mapping, token_cache)
    return resolved


def _alike(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    return dtype in _TYPES and all(t.is_cuda and t.dtype == dtype and t.stride(-1) == 1 for t in tensors)


def _indices(*tensors: Tensor) -> bool:
    return all(t.is_cuda and t.dtype == torch.int32 and t.dim() == 1 and t.is_contiguous() for t in tensors)


def _like(x: Tensor) -> Tensor:
    """Contiguous, which `empty_like` of a strided view need not be."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
