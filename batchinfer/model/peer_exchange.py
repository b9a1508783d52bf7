"""How the GPUs of a replica's ranks come to have memory in common: who can, how they exchange it, what is said where not."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchinfer import ops
from batchinfer.job.process import boot_id
from batchinfer.model.parallel import Overlap, TensorParallel

logger = logging.getLogger(__name__)


def connect(
    parallel: TensorParallel, max_rows: int, size: int, dtype: torch.dtype, device: torch.device, peer_memory: bool = True
) -> TensorParallel:
    """Ranks on GPUs with what sums of up to max_rows rows of `size` elements need beside NCCL. All ranks call this together.

    `peer_memory`: with memory in common, if all of their GPUs can; where one cannot, the log says why.
    """
    if parallel.size == 1 or device.type != "cuda":
        return parallel
    peers = _share(parallel, max_rows, size * dtype.itemsize, device) if peer_memory else None
    overlap = None if peers else Overlap(torch.empty(max_rows, size, dtype=dtype, device=device))
    return replace(parallel, peers=peers, overlap=overlap)


def _share(parallel: TensorParallel, max_rows: int, row_bytes: int, device: torch.device) -> ops.PeerMemory | None:
    obstacles = _gather(parallel, _obstacle(parallel, row_bytes, device))
    if not any(obstacles):
        memory, y_offset = ops.allocate_peer_memory(parallel.size, max_rows, row_bytes, device)
        torch.cuda.synchronize(device)
        addresses, refusal = _map(_gather(parallel, ops.peer_handle(memory)), memory, parallel.rank, device)
        obstacles = _gather(parallel, refusal)
    if any(obstacles):
        if parallel.rank == 0:
            told = "; ".join(dict.fromkeys(filter(None, obstacles)))
            logger.warning("ranks sum through NCCL alone, not through each other's memory: %s", told)
        return None
    capacities = ops.peer_capacities(parallel.size, max_rows, row_bytes)
    return ops.PeerMemory(parallel.rank, memory, torch.tensor(addresses), y_offset, *capacities)


def _gather(parallel: TensorParallel, what: Any) -> list[Any]:
    """What every rank has to say, in their order."""
    told = [None] * parallel.size
    dist.all_gather_object(told, what, group=parallel.host_group)
    return told


def _obstacle(parallel: TensorParallel, row_bytes: int, device: torch.device) -> str:
    """Why this rank's GPU cannot have memory in common with the others'; empty: it can."""
    hosts = _gather(parallel, boot_id())
    if len(set(hosts)) > 1:
        return "they are on several hosts"
    if parallel.size not in ops.PEER_RANKS:
        return f"there are {parallel.size} of them, and not {', '.join(map(str, ops.PEER_RANKS))}"
    if row_bytes % 16 or row_bytes > ops.PEER_ROW_BYTES:
        return f"rows of {row_bytes:,} bytes are no multiple of 16 up to {ops.PEER_ROW_BYTES:,}"
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
