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
ROW_BYTES = 32 << 10  # the longest row
PUSH_BYTES = {2: 4 << 20, 4: 512 << 10, 8: 256 << 10}  # by ranks: up to here pushing is faster
ALL_BLOCKS = 256  # more than a device runs at once


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """What the ranks of a replica give to each other. `addresses` [ranks]: each one's, as this process maps them."""

    rank: int
    memory: Tensor  # this rank's own, bytes
    addresses: Tensor  # int64, on the host
    y_offset: int
    push_bytes: int
    split_bytes: int

    def takes(self, x: Tensor) -> bool:
        """Whether `reduce_norm` can sum x [T, D]."""
        row_bytes = x.shape[1] * x.element_size()
        half_or_float = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return half_or_float and row_bytes % 16 == 0 and row_bytes <= ROW_BYTES and x.nbytes <= self.split_bytes

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
    _launch(peers, y, total, x, residual, weight, eps, 0)
    return y, total


def split(peers: PeerMemory, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The way of many rows."""
    y, total = peers.y(x), torch.empty_like(x)
    split_into(peers, y, total, x, residual, weight, eps, ALL_BLOCKS)
    return y, total


def split_into(
    peers: PeerMemory,
    y: Tensor,
    total: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    max_blocks: int,
) -> None:
    """`split` of some rows of a step: y is those rows of `peers.y`. `max_blocks`: how much of the device to take."""
    _launch(peers, y, total, x, residual, weight, eps, max_blocks)


def _launch(
    peers: PeerMemory,
    y: Tensor,
    total: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    max_blocks: int,
) -> None:
    where = peers.addresses, peers.rank, peers.push_bytes, peers.split_bytes
    torch.ops.batchinfer.reduce_norm(y, total, x, residual, weight, eps, *where, max_blocks)
