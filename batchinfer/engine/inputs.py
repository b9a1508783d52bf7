"""What the model reads of a step, in one int32 buffer: token ids, positions, slots, attention plans, block tables.

Kernels find everything through pointers. So for a CUDA graph the buffer is the graph's own, always at the same address, and
everything in it lies where the graph was captured with it: a step of fewer tokens is padded with tokens that have no slot and
that nobody attends for, its plan with work that is empty. Block tables come last, because their width differs from step to
step: they are one flat list, and a plan says where in it a sequence's table begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from batchinfer import ops
from batchinfer.engine.batch import Batch
from batchinfer.model.layers import AttentionInputs

ROWS = 3  # token ids, positions and slots, each of T words
ALIGNED = 4  # words: kernels read records of a plan 16 bytes at a time


@dataclass(frozen=True, slots=True, eq=False)
class ModelInputs:
    """A step as the model takes it, on the device. T tokens, padding included."""

    token_ids: torch.Tensor  # [T]; -1 - slot: the token that the step before drew into that slot
    positions: torch.Tensor  # [T]
    attention: AttentionInputs


@dataclass(frozen=True, slots=True, eq=False)
class PackedInputs:
    """A step on the host. `plans`: of each sliding window that the model has (None: of layers without one)."""

    buffer: np.ndarray
    size: int  # T
    plans: Mapping[int | None, ops.AttentionPlan]

    @property
    def has_tiles(self) -> bool:
        return any(plan.counts.tiles for plan in self.plans.values())

    def over(self, flat: torch.Tensor, num_heads: int, head_dim: int) -> ModelInputs:
        """Views of `flat` on the device, where `buffer` has been copied to, or will be, and room for partial results."""
        token_ids, positions, slot_mapping = flat[: ROWS * self.size].view(ROWS, self.size).unbind(0)
        offset, plans = _aligned(ROWS * self.size), {}
        for window, plan in self.plans.items():
            plans[window] = ops.DevicePlan.over(plan, flat[offset : offset + len(plan.buffer)], num_heads, head_dim)
            offset += _aligned(len(plan.buffer))
        block_tables = flat[offset:].unsqueeze(1)
        return ModelInputs(token_ids, positions, AttentionInputs(slot_mapping, block_tables, plans))


class InputPacker:
    """Packs the batches of one rank of a model whose layers have `windows`."""

    def __init__(self, windows: Iterable[int | None], shape: ops.AttentionShape, max_context: int) -> None:
        self._shapes = {window: replace(shape, window=window) for window in windows}
        self._max_context = max_context

    def pack(self, batch: Batch, size: int | None = None) -> PackedInputs:
        """The batch as it is, or padded to `size` tokens, with or without tiles as it needs them. PlanTooLarge: it cannot be."""
        capacities = self._capacities(size)
        plans = {
            window: ops.plan_attention(batch.cu_seqlens_q, batch.context_lens, batch.block_tables, shape, capacities[window])
            for window, shape in self._shapes.items()
        }
        for plan in plans.values():  # tables lie one behind the other
            plan.segments[:, 1] *= batch.block_tables.shape[1]
            plan.tiles[:, 2] *= batch.block_tables.shape[1]
        packed = _join(plans, size or batch.num_tokens, batch.block_tables)
        rows, count = packed.buffer[: ROWS * packed.size].reshape(ROWS, packed.size), batch.num_tokens
        rows[0, :count], rows[1, :count], rows[2, :count] = batch.token_ids, batch.positions, batch.slot_mapping
        return packed

    def padding(self, size: int, tiles: bool) -> PackedInputs:
        """Nothing but padding: what a graph is captured with."""
        plans = {}
        for window, capacity in self._capacities(size).items():
            assert capacity is not None
            plans[window] = ops.empty_plan(capacity if tiles else capacity.without_tiles(), self._shapes[window])
        return _join(plans, size, np.zeros((0, 1), dtype=np.int32))

    def _capacities(self, size: int | None) -> dict[int | None, ops.PlanCapacity | None]:
        if size is None:
            return dict.fromkeys(self._shapes)
        return {window: ops.PlanCapacity.for_tokens(size, self._max_context, shape) for window, shape in self._shapes.items()}


def _join(plans: Mapping[int | None, ops.AttentionPlan], size: int, block_tables: np.ndarray) -> PackedInputs:
    """One buffer of `size` tokens that are padding, the plans, and the block tables."""
    offset = _aligned(ROWS * size)
    words = sum(_aligned(len(plan.buffer)) for plan in plans.values())
    buffer = np.zeros(offset + words + block_tables.size, dtype=np.int32)
    buffer[2 * size : ROWS * size] = -1
    for plan in plans.values():
        buffer[offset : offset + len(plan.buffer)] = plan.buffer
        offset += _aligned(len(plan.buffer))
    buffer[offset:] = block_tables.reshape(-1)
    return PackedInputs(buffer, size, plans)


def _aligned(words: int) -> int:
    return -(-words // ALIGNED) * ALIGNED
