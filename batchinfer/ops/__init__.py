"""The operations that a model and the engine are made of. What they compute is specified in `reference.py`.

Here, and nowhere else, it is decided which code computes them: plain torch (`reference`) on a CPU, kernels of `csrc/` on a GPU,
unless `choose_backend` was told otherwise. What a kernel cannot take, its wrapper hands to the reference; its module says what.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops import (
    attention,
    elementwise,
    fused_softmax_attention,
    logprobs,
    reference,
    reference_attention,
    reference_linear,
    sampling,
    skinny,
)
from batchinfer.ops.attention import DevicePlan
from batchinfer.ops.attention_plan import AttentionPlan, AttentionShape, PlanCapacity, PlanTooLarge, empty_plan, plan_attention
from batchinfer.ops.compiled import load_kernels
from batchinfer.ops.peer_memory import RANKS as PEER_RANKS
from batchinfer.ops.peer_memory import ROW_BYTES as PEER_ROW_BYTES
from batchinfer.ops.peer_memory import PeerMemory, reduce_norm
from batchinfer.ops.peer_memory import allocate as allocate_peer_memory
from batchinfer.ops.peer_memory import capacities as peer_capacities
from batchinfer.ops.peer_memory import handle_of as peer_handle
from batchinfer.ops.peer_memory import map_handle as map_peer
from batchinfer.ops.reference import LogProbabilities, apply_penalties, apply_token_bitmask
from batchinfer.ops.reference_attention import PieceGroup, group_pieces

__all__ = [
    "PEER_RANKS",
    "PEER_ROW_BYTES",
    "AttentionPlan",
    "AttentionShape",
    "DevicePlan",
    "LogProbabilities",
    "PeerMemory",
    "Plan",
    "PlanCapacity",
    "PlanTooLarge",
    "allocate_peer_memory",
    "apply_penalties",
    "apply_token_bitmask",
    "attention_takes",
    "choose_backend",
    "draw",
    "embedding",
    "empty_plan",
    "feed_tokens",
    "greedy",
    "group_pieces",
    "linear",
    "linear_silu",
    "log_probabilities",
    "map_peer",
    "norm_linear",
    "norm_linear_silu",
    "peer_capacities",
    "peer_handle",
    "plan_attention",
    "planned_attention",
    "reduce_norm",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_and_mul",
]

Plan = DevicePlan | list[PieceGroup]  # of a step's attention: for kernels, or for plain torch

_backend = "auto"  # of this process


def choose_backend(name: str, device: torch.device) -> None:
    """Once, before a model runs. `name` is `engine.attention_backend`: auto, reference or fused_softmax.

    ConfigError: kernels are needed and are missing.
    """
    global _backend
    _backend = name
    if device.type == "cuda" and name != "reference":
        load_kernels()


def _by_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and _backend != "reference"


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return (elementwise if _by_kernels(x) else reference).rms_norm(x, weight, eps, residual)


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
    rotate = elementwise.rope_and_cache if _by_kernels(q) else reference.rope_and_cache
    return rotate(q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    return (elementwise if _by_kernels(gate_up) else reference).silu_and_mul(gate_up)


def embedding(token_ids: Tensor, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    return (elementwise if _by_kernels(weight) else reference).embedding(token_ids, weight, start, stop)


def feed_tokens(token_ids: Tensor, last_tokens: Tensor, slot_mapping: Tensor, token_cache: Tensor) -> Tensor:
    feed = elementwise.feed_tokens if _by_kernels(token_ids) else reference.feed_tokens
    return feed(token_ids, last_tokens, slot_mapping, token_cache)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (skinny if _by_kernels(x) else reference_linear).linear(x, weight, bias)


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (skinny if _by_kernels(x) else reference_linear).linear_silu(x, weight, bias)


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return (skinny if _by_kernels(x) else reference_linear).norm_linear(x, residual, norm_weight, eps, weight, bias)


def norm_linear_silu(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return (skinny if _by_kernels(x) else reference_linear).norm_linear_silu(x, residual, norm_weight, eps, weight, bias)


def attention_takes(k_cache: Tensor, heads_per_kv_head: int) -> bool:
    """Whether kernels attend over this cache [blocks, block_size, K, D], by a `DevicePlan`; if not, `group_pieces` plans."""
    return _backend == "auto" and attention.kernels_take(k_cache, heads_per_kv_head)


def planned_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, plan: Plan, scale: float, window: int | None
) -> Tensor:
    if isinstance(plan, DevicePlan):
        return attention.planned_attention(q, k_cache, v_cache, block_tables, plan, scale, window)
    attend = fused_softmax_attention.attend if _backend == "fused_softmax" else reference_attention.attend
    return attend(q, k_cache, v_cache, plan, scale, window)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    return sampling.greedy(logits) if _by_kernels(logits) else reference.greedy(logits)


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    pick = sampling.draw if _by_kernels(logits) else reference.draw
    return pick(logits, temperature, top_k, top_p, min_p, seeds, positions)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    return draw(logits, temperature, top_k, top_p, min_p, seeds, positions)[0]


def log_probabilities(logits: Tensor, token_ids: Tensor, k: int) -> LogProbabilities:
    return (logprobs if _by_kernels(logits) else reference).log_probabilities(logits, token_ids, k)
