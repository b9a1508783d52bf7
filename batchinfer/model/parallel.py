"""Tensor parallelism between the ranks of one replica: who they are, and the collectives that they need.

How sizes divide over ranks is `ModelShape.local_sizes`. A replica of one rank has no process group at all. GPUs of one host that
can map each other's memory sum through it; all others, and what is not made for it, through NCCL, or gloo on CPUs.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchinfer import ops
from batchinfer.job.process import boot_id

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # of a step, or of the slowest rank's loading
HOST_TIMEOUT = timedelta(days=7)  # ranks wait for the next batch as long as rank 0 waits for rows


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks that share a model. The default is a model of one rank.

    `group` carries tensors on the device, `host_group` (gloo) carries batches between hosts without a wait on the GPU, `peers`
    is memory that the ranks' GPUs map of each other.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None
    peers: ops.PeerMemory | None = None

    def reduce_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm of the sum of all ranks' x [T, D], plus residual, the same to the bit on every rank; and the new residual.

        The normed rows hold until the next call, and residuals are only good for calls with as many rows.
        """
        if self.peers is not None and self.peers.takes(x):
            return ops.reduce_norm(self.peers, x, residual, weight, eps)
        total = self.all_reduce(x)
        if residual is None:
            return ops.rms_norm(total, weight, eps), total  # type: ignore[return-value]  # a tensor, since no residual was given
        return ops.rms_norm(total, weight, eps, residual)  # type: ignore[return-value]  # a pair, since one was

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


def connect_peers(parallel: TensorParallel, max_rows: int, row_bytes: int, device: torch.device) -> TensorParallel:
    """With memory that the ranks' GPUs have in common, for sums of up to `max_rows` rows. All ranks call this together.

    As it was where a GPU cannot, and the log says why.
    """
    if parallel.size == 1 or device.type != "cuda":
        return parallel
    obstacles = [told for told in _gather(parallel, _obstacle(parallel, device)) if told]
    if not obstacles:
        memory, y_offset = ops.allocate_peer_memory(parallel.size, max_rows, row_bytes, device)
        torch.cuda.synchronize(device)
        handles = _gather(parallel, ops.peer_handle(memory))
        addresses, refusal = _map(handles, memory, parallel.rank, device)
        obstacles = [told for told in _gather(parallel, refusal) if told]
    if obstacles:
        if parallel.rank == 0:
            logger.warning(
                "ranks sum through NCCL alone, not through each other's memory: %s", "; ".join(dict.fromkeys(obstacles))
            )
        return parallel
    capacities = ops.peer_capacities(parallel.size, max_rows, row_bytes)
    return replace(parallel, peers=ops.PeerMemory(parallel.rank, memory, torch.tensor(addresses), y_offset, *capacities))


def _gather(parallel: TensorParallel, what: Any) -> list[Any]:
    """What every rank has to say, in their order."""
    told = [None] * parallel.size
    dist.all_gather_object(told, what, group=parallel.host_group)
    return told


def _obstacle(parallel: TensorParallel, device: torch.device) -> str:
    """Why this rank's GPU cannot have memory in common with the others'; empty: it can."""
    hosts = _gather(parallel, boot_id())
    if len(set(hosts)) > 1:
        return "they are on several hosts"
    if parallel.size not in ops.PEER_RANKS:
        return f"there are {parallel.size} of them, and not {', '.join(map(str, ops.PEER_RANKS))}"
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return "NCCL_P2P_DISABLE is set"
    others = [index for index in _gather(parallel, device.index) if index != device.index]
    refused = [index for index in others if not torch.cuda.can_device_access_peer(device.index, index)]
    return f"GPU {device.index} cannot reach the memory of GPU {refused[0]}" if refused else ""


def _map(handles: list[Tensor], own: Tensor, rank: int, device: torch.device) -> tuple[list[int], str]:
    """Addresses of all ranks' memory, or why one cannot be mapped."""
    try:
        return [own.data_ptr() if i == rank else ops.map_peer(handle, device) for i, handle in enumerate(handles)], ""
    except RuntimeError as error:
        return [], f"rank {rank}: {error}"
