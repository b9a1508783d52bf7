"""Tensor parallelism between the ranks of one replica: who they are, and the collectives that they need.

How sizes divide over ranks is `ModelShape.local_sizes`. A replica of one rank has no process group at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # of a step, or of the slowest rank's loading
HOST_TIMEOUT = timedelta(days=7)  # ranks wait for the next batch as long as rank 0 waits for rows


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks that share a model. The default is a model of one rank.

    `group` carries tensors on the device, `host_group` (gloo) carries batches between hosts without a wait on the GPU.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None

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
