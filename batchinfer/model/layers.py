"""Layers split over tensor-parallel ranks. Each layer states which slices of the checkpoint it wants, and where to.

Weights are held by a format object (`LinearWeight`), so that a quantised format is another class and no layer changes.
Column-parallel layers split outputs, row-parallel layers split inputs and sum over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchinfer import ops
from batchinfer.model.config import ModelShape
from batchinfer.model.parallel import TensorParallel

KVCache = tuple[Tensor, Tensor]  # keys and values of one layer, each [num_blocks, block_size, local KV heads, head_dim]


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Where each token of a flat batch of T tokens belongs. Sliding windows come from the model's shape."""

    slot_mapping: Tensor  # [T] place of the token's key and value in the cache; -1: padding, not stored
    block_tables: Tensor  # int32: [S, max_blocks] of S sequences; for kernels flat, [.., 1]
    plans: Mapping[int | None, ops.Plan]  # how to attend with each window that the model has (None: without one)

    def attend(self, q: Tensor, kv_cache: KVCache, scale: float, window: int | None) -> Tensor:
        """Causal attention of q [T, H, D] over what the cache holds of its sequences. Returns [T, H, D]."""
        return ops.planned_attention(q, *kv_cache, self.block_tables, self.plans[window], scale, window)


@dataclass(frozen=True, eq=False)
class WeightSlice:
    """A wish of a layer: elements start to stop along `dim` of checkpoint tensor `name` belong into `destination`."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    dim: int
    start: int
    stop: int
    destination: Tensor


class LinearWeight(nn.Module):
    """The matrix [out_features, in_features] of a linear layer in some format. Checkpoints name its tensors `name`.something.

    Biases are plain in every format: the layer holds them, and the format may add them within its product.
    """

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in_features] -> [T, out_features], plus bias [out_features]."""
        raise NotImplementedError

    def into(self, out: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """`forward` of many rows, into `out` [T, out_features]."""
        raise NotImplementedError

    def gate(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`forward` of a matrix of gate rows, then up rows, with silu(gate) * up behind it: [T, out_features / 2]."""
        return ops.silu_and_mul(self(x, bias))

    def after_norm(self, x: Tensor, residual: Tensor | None, norm: RMSNorm, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward` of what `norm` makes of x and the residual [T, in_features], and the new residual.

        A format whose product can do the norm or the activation within overrides this, `gate` and `gate_after_norm`.
        """
        normed, residual = norm(x, residual)
        y: Tensor = self(normed, bias)
        return y, residual

    def gate_after_norm(
        self, x: Tensor, residual: Tensor | None, norm: RMSNorm, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`gate` of what `norm` makes of x and the residual, and the new residual."""
        normed, residual = norm(x, residual)
        return self.gate(normed, bias), residual

    def rows(self, name: str, shape: tuple[int, int], start: int, stop: int, at: int) -> Iterator[WeightSlice]:
        """Rows start to stop of checkpoint matrix `name`, to be held from row `at` on."""
        raise NotImplementedError

    def columns(self, name: str, shape: tuple[int, int], start: int, stop: int) -> Iterator[WeightSlice]:
        """Columns start to stop of checkpoint matrix `name`: all that this weight holds."""
        raise NotImplementedError


class PlainWeight(LinearWeight):
    """The matrix itself, in the model's dtype. Zero until loaded, so that rows which only pad stay zero."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = _parameter(out_features, in_features, dtype=dtype, device=device)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, bias)

    def into(self, out: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        if bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(bias, x, self.weight.t(), out=out)

    def gate(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear_silu(x, self.weight, bias)

    def after_norm(self, x: Tensor, residual: Tensor | None, norm: RMSNorm, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.norm_linear(x, residual, norm.weight, norm.eps, self.weight, bias)

    def gate_after_norm(
        self, x: Tensor, residual: Tensor | None, norm: RMSNorm, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.norm_linear_silu(x, residual, norm.weight, norm.eps, self.weight, bias)

    def rows(self, name: str, shape: tuple[int, int], start: int, stop: int, at: int) -> Iterator[WeightSlice]:
        yield WeightSlice(f"{name}.weight", shape, 0, start, stop, self.weight[at : at + stop - start])

    def columns(self, name: str, shape: tuple[int, int], start: int, stop: int) -> Iterator[WeightSlice]:
        yield WeightSlice(f"{name}.weight", shape, 1, start, stop, self.weight)


@dataclass(frozen=True)
class OutputPart:
    """One checkpoint layer of a fused column-parallel layer: its name, its rows, and those that are this rank's."""

    name: str
    total: int
    start: int
    stop: int


class ColumnParallelLinear(nn.Module):
    """Several linear layers over one normed input, fused into one matrix product. Each rank computes its rows of each.

    x is what a row-parallel layer or the embedding gave: of several ranks, summands.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[OutputPart],
        bias: bool,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features, self.parts, self.parallel = in_features, parts, parallel
        self.sizes = [part.stop - part.start for part in parts]
        self.weight = PlainWeight(sum(self.sizes), in_features, dtype, device)
        self.bias = _parameter(sum(self.sizes), dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The norm in front of the layer, then the layer: (x, residual) -> (y, new residual)."""
        if self.parallel.size == 1:
            return self.weight.after_norm(x, residual, norm, self.bias)
        if len(self.parallel.pieces(len(x))) > 1:
            return self._in_pieces(x, residual, norm)
        normed, residual = norm.of_sum(x, residual, self.parallel)
        return self.weight(normed, self.bias), residual

    def gate(self, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The same for a layer whose two parts are gate and up, with their activation behind it."""
        if self.parallel.size == 1:
            return self.weight.gate_after_norm(x, residual, norm, self.bias)
        if len(self.parallel.pieces(len(x))) > 1:
            gate_up, residual = self._in_pieces(x, residual, norm)
            return ops.silu_and_mul(gate_up), residual
        normed, residual = norm.of_sum(x, residual, self.parallel)
        return self.weight.gate(normed, self.bias), residual

    def _in_pieces(self, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """`forward` in which the product of one piece runs beside the sum of the next."""
        y = x.new_empty(len(x), sum(self.sizes))
        normed, residual = self.parallel.start_sums(x, residual, norm.weight, norm.eps)
        for index, piece in enumerate(self.parallel.pieces(len(x))):
            self.parallel.await_sum(index)
            self.weight.into(y[piece], normed[piece], self.bias)
        return y, residual

    def slices(self) -> Iterator[WeightSlice]:
        at = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            yield from self.weight.rows(part.name, (part.total, self.in_features), part.start, part.stop, at)
            if self.bias is not None:
                yield WeightSlice(f"{part.name}.bias", (part.total,), 0, part.start, part.stop, self.bias[at : at + size])
            at += size


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are split: every rank multiplies its columns, and the sum over ranks is the result.

    A rank gives its summand: the norm that comes next sums. Each holds the bias; the first one's summand has it in it.
    """

    def __init__(
        self,
        name: str,
        out_features: int,
        in_features: int,
        bias: bool,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.name, self.shape, self.parallel, self.adds_bias = name, (out_features, in_features), parallel, parallel.rank == 0
        self.start, self.stop = parallel.bounds(in_features, in_features // parallel.size)
        self.weight = PlainWeight(out_features, self.stop - self.start, dtype, device)
        self.bias = _parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias, pieces = self.bias if self.adds_bias else None, self.parallel.pieces(len(x))
        if len(pieces) == 1:
            y: Tensor = self.weight(x, bias)
            return y
        y = x.new_empty(len(x), self.shape[0])
        for index, piece in enumerate(pieces):
            self.weight.into(y[piece], x[piece], bias)
            self.parallel.give(index)
        return y

    def slices(self) -> Iterator[WeightSlice]:
        yield from self.weight.columns(self.name, self.shape, self.start, self.stop)
        if self.bias is not None:
            size = self.shape[0]
            yield WeightSlice(f"{self.name}.bias", (size,), 0, 0, size, self.bias)


class VocabParallel(nn.Module):
    """A matrix [vocab_size, hidden_size] split by rows: as an embedding, as the head, or (tied) as both.

    The vocabulary is padded to a multiple of the ranks with zero rows, whose logits are cut off again.
    """

    def __init__(self, name: str, shape: ModelShape, parallel: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name, self.shape, self.parallel = name, (shape.vocab_size, shape.hidden_size), parallel
        local = shape.local_sizes(parallel.size).vocab_size
        self.start, self.stop = parallel.bounds(shape.vocab_size, local)
        self.weight = _parameter(local, shape.hidden_size, dtype=dtype, device=device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden_size]: this rank's summand, which is zero for tokens of others."""
        summand = ops.embedding(token_ids, self.weight, self.start, self.stop)
        if len(pieces := self.parallel.pieces(len(summand))) > 1:
            for index in range(len(pieces)):
                self.parallel.give(index)
        return summand

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, hidden_size] -> [S, vocab_size], the same on every rank."""
        gathered = self.parallel.all_gather_last(ops.linear(hidden, self.weight))
        return gathered[:, : self.shape[0]]

    def slices(self) -> Iterator[WeightSlice]:
        yield WeightSlice(self.name, self.shape, 0, self.start, self.stop, self.weight[: self.stop - self.start])


class RMSNorm(nn.Module):
    """Adds to the residual stream, if there is one yet, and norms it: (x, residual) -> (normed, new residual)."""

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.weight = _parameter(size, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            normed = ops.rms_norm(x, self.weight, self.eps)
            return normed, x  # type: ignore[return-value]  # a tensor, since no residual was given
        return ops.rms_norm(x, self.weight, self.eps, residual)  # type: ignore[return-value]  # a pair, since one was

    def of_sum(self, x: Tensor, residual: Tensor | None, parallel: TensorParallel) -> tuple[Tensor, Tensor]:
        """`forward` of the sum of all ranks' x."""
        return parallel.reduce_norm(x, residual, self.weight, self.eps)

    def slices(self) -> Iterator[WeightSlice]:
        size = self.weight.shape[0]
        yield WeightSlice(self.name, (size,), 0, 0, size, self.weight)


def _parameter(*size: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*size, dtype=dtype, device=device), requires_grad=False)
