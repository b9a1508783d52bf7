"""Memory that GPUs map of each other, and what is done through it: the sum over ranks, residual add and norm in one kernel.

Few rows are pushed: everybody sends its summands to all and sums by itself, which takes one way over the link. Of many rows each
rank sums and norms a part, and sends that to all; a residual is then only kept up by the rank whose part it is in, which
is right as long as all calls of a step have as many rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.ops.compiled import load_kernels

HANDLE_BYTES = 64
RANKS = (2, 4, 8)  # that there are kernels for
ROW_BYTES = 32 << 10  # the longest row; all are multiples of 16
PUSH_BYTES = {2: 3 << 20, 4: 512 << 10, 8: 192 << 10}  # by ranks: up to here pushing is faster
ALL_BLOCKS = 512  # more than a device runs at once


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """What the ranks of a replica give to each other. `addresses` [ranks]: each one's, as this process maps them."""

    rank: int
    memory: Tensor  # this rank's own, bytes
    addresses: Tensor  # int64, on the host
    y_offset: int
    push_bytes: int
    split_bytes: int

    def y(self, x: Tensor) -> Tensor:
        """The place like x [T, D] where other ranks put what they normed. It holds until the next call."""
        return self.memory[self.y_offset : self.y_offset + x.nbytes].view(x.dtype).view(x.shape)


def allocate(ranks: int, max_rows: int, row_bytes: int, device: torch.device) -> tuple[Tensor, int]:
    """Peer memory for x of up to max_rows rows, ready for use, and the offset of y in it."""
    load_kernels()
    like = torch.empty(0, device=device)
    y_offset, num_bytes = torch.ops.batchinfer.peer_layout(like, ranks, *capacities(ranks, max_rows, row_bytes), row_bytes)
    return torch.ops.batchinfer.peer_memory(like, num_bytes), y_offset


def capacities(ranks: int, max_rows: int, row_bytes: int) -> tuple[int, int]:
    """Bytes of the largest x that is pushed, and of the largest that is split."""
    largest = max_rows * row_bytes
    return min(PUSH_BYTES[ranks], largest), largest


def handle_of(memory: Tensor) -> Tensor:
    """What another process of this host maps the memory by."""
    handle = torch.empty(HANDLE_BYTES, dtype=torch.uint8)
    torch.ops.batchinfer.peer_handle(memory, handle)
    return handle


def map_handle(handle: Tensor, device: torch.device) -> int:
    """Where `device` now sees that memory. RuntimeError: the driver refuses."""
    address: int = torch.ops.batchinfer.peer_map(torch.empty(0, device=device), handle)
    return address


def reduce_norm(peers: PeerMemory, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of the sum of all ranks' x [T, D], plus residual; and the new residual. All ranks call it with as many rows."""
    way = push if x.nbytes <= peers.push_bytes else split
    return way(peers, x, residual, weight, eps)


def push(peers: PeerMemory, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The way of few rows."""
    y, total = torch.empty_like(x), torch.empty_like(x)
    torch.ops.batchinfer.push_reduce_norm(y, total, x, residual, weight, eps, *_where(peers))
    return y, total


def split(
    peers: PeerMemory, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, max_blocks: int = ALL_BLOCKS
) -> tuple[Tensor, Tensor]:
    """The way of many rows. `max_blocks`: how much of the device to take at most."""
    y, total = peers.y(x), torch.empty_like(x)
    torch.ops.batchinfer.split_reduce_norm(y, total, x, residual, weight, eps, *_where(peers), max_blocks)
    return y, total


def _where(peers: PeerMemory) -> tuple[Tensor, int, int, int]:
    return peers.addresses, peers.rank, peers.push_bytes, peers.split_bytes
