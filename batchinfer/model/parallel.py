"""Tensor parallelism between the ranks of one replica: who they are, and the collectives that they need.

How sizes divide over ranks is `ModelShape.local_sizes`. A replica of one rank has no process group at all. GPUs of one host that
can map each other's memory sum through it; all others, and what is not made for it, through NCCL, or gloo on CPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from batchinfer import ops

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # of a step, or of the slowest rank's loading
HOST_TIMEOUT = timedelta(days=7)  # ranks wait for the next batch as long as rank 0 waits for rows

PIECES = 2
OVERLAP_ROWS = 1024  # from here on a sum by NCCL takes longer than products lose by being cut in pieces


class Overlap:
    """NCCL's sums of many rows in pieces, beside the products that give summands and take sums: a stream, and events for each.

    `normed` [rows, D]: where the normed rows go.
    """

    def __init__(self, normed: Tensor) -> None:
        self.normed = normed
        self.stream = torch.cuda.Stream(normed.device, priority=-1)
        self.given = [torch.cuda.Event() for _ in range(PIECES)]
        self.summed = [torch.cuda.Event() for _ in range(PIECES)]


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks that share a model. The default is a model of one rank.

    `group` carries tensors on the device, `host_group` (gloo) carries batches between hosts without a wait on the GPU, `peers`
    is memory that the ranks' GPUs map of each other. With `overlap`, which is for GPUs without such memory, sums of many rows are
    cut in pieces: who has launched the summands of a piece says so (`give`), the norm that comes next begins with all of them
    (`start_sums`), and who goes on with a piece waits for it (`await_sum`).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None
    peers: ops.PeerMemory | None = None
    overlap: Overlap | None = None

    def reduce_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm of the sum of all ranks' x [T, D], plus residual, the same to the bit on every rank; and the new residual.

        The normed rows hold until the next call, and residuals are only good for calls with as many rows.
        """
        if len(self.pieces(len(x))) > 1:
            normed, total = self.start_sums(x, residual, weight, eps)
            for index in range(PIECES):
                self.await_sum(index)
            return normed, total
        if self.peers is not None:
            return ops.reduce_norm(self.peers, x, residual, weight, eps)
        total = self.all_reduce(x)
        if residual is None:
            return ops.rms_norm(total, weight, eps), total  # type: ignore[return-value]  # a tensor, since no residual was given
        return ops.rms_norm(total, weight, eps, residual)  # type: ignore[return-value]  # a pair, since one was

    def pieces(self, rows: int) -> list[slice]:
        """What sums of so many rows are cut into. Depends on nothing else, so ranks and layers agree."""
        if self.overlap is None or rows < OVERLAP_ROWS or torch.cuda.is_current_stream_capturing():
            return [slice(0, rows)]
        bounds = [rows * i // PIECES for i in range(PIECES + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def give(self, index: int) -> None:
        """All work that makes the summands of a piece has been launched."""
        assert self.overlap is not None
        self.overlap.given[index].record()

    def start_sums(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`reduce_norm` of pieces that were given, on a stream of its own. Returns what will be the normed rows and the residual.

        They are written when a piece has been given: whatever had their memory before must have ended by then. So the residual
        takes the place of the old one, or of x, and the rows go where nothing else does.
        """
        overlap, total = self.overlap, x if residual is None else residual
        assert overlap is not None
        normed = overlap.normed[: len(x)]
        with torch.cuda.stream(overlap.stream):
            for index, piece in enumerate(self.pieces(len(x))):
                overlap.given[index].wait()
                summed = self.all_reduce(x[piece])
                if residual is not None:
                    torch.add(summed, residual[piece], out=total[piece])
                normed[piece] = ops.rms_norm(total[piece], weight, eps)  # type: ignore[assignment]  # a tensor
                overlap.summed[index].record()
        return normed, total

    def await_sum(self, index: int) -> None:
        """What is launched from here on may use the piece."""
        assert self.overlap is not None
        self.overlap.summed[index].wait()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place. The order of summation is the same on every rank."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """All ranks' x [..., n] side by side in rank order: [..., size * n]."""
        if self.size == 1:
            return x
        gathered = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=self.group)
        return gathered.movedim(0, -2).flatten(-2)

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's x into every rank's x."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)

    def bounds(self, total: int, local: int) -> tuple[int, int]:
        """The part of `total` that falls to this rank when every rank takes `local` and the last ones may get less."""
        return min(self.rank * local, total), min((self.rank + 1) * local, total)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def init_distributed(device: torch.device) -> TensorParallel:
    """Meet the other ranks as torchrun's environment says (RANK, WORLD_SIZE, MASTER_*): by NCCL on CUDA, else by gloo."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return TensorParallel()
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT, device_id=device if on_gpu else None)
    host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return TensorParallel(dist.get_rank(), size, dist.group.WORLD, host_group)
