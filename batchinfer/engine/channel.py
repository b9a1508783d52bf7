"""How rank 0 shares each step's batch with the other ranks of its replica, host to host.

Through shared memory (`engine.ring`) when all ranks are on one host, else by gloo. NCCL would do it only after a wait on the
GPU. Every rank opens the channel together with the others; rank 0 sends, the others receive.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from batchinfer.engine.batch import Batch
from batchinfer.engine.ring import RingAddress, RingReader, RingShape, RingWriter

logger = logging.getLogger(__name__)


class BatchChannel(Protocol):
    """Batches arrive whole, in order, and belong to who received them."""

    def send(self, batch: Batch) -> None:
        """Rank 0: the batch may be changed or forgotten afterwards."""

    def send_stop(self) -> None:
        """Rank 0: there will be no more batches."""

    def receive(self) -> Batch | None:
        """Other ranks: wait for the next batch; None: rank 0 has sent `send_stop`."""


class GlooChannel:
    """Two broadcasts a batch: the size in words, then the words. Size 0 is the message to stop."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def send(self, batch: Batch) -> None:
        buffer = batch.pack()
        self._broadcast(np.array([buffer.size], dtype=np.int64))
        self._broadcast(buffer)

    def send_stop(self) -> None:
        self._broadcast(np.zeros(1, dtype=np.int64))

    def receive(self) -> Batch | None:
        size = np.zeros(1, dtype=np.int64)
        self._broadcast(size)
        if size[0] == 0:
            return None
        buffer = np.empty(int(size[0]), dtype=np.int32)
        self._broadcast(buffer)
        return Batch.unpack(buffer)

    def _broadcast(self, array: np.ndarray) -> None:
        dist.broadcast(torch.from_numpy(array), group=self.group, group_src=0)


class RingChannel:
    """One message a batch. No bytes are the message to stop."""

    def __init__(self, end: RingWriter | RingReader) -> None:
        self.end = end

    def send(self, batch: Batch) -> None:
        self._writer.put(batch.pack().data.cast("B"))

    def send_stop(self) -> None:
        self._writer.put(b"")

    def receive(self) -> Batch | None:
        assert isinstance(self.end, RingReader), "rank 0 has nobody to receive from"
        # A copy: a view of the ring would have to outlive the transfer to the GPU, which the host does not wait for.
        message = self.end.get()
        return Batch.unpack(message.view(np.int32)) if message.size else None

    @property
    def _writer(self) -> RingWriter:
        assert isinstance(self.end, RingWriter), "only rank 0 sends"
        return self.end


def open_channel(group: dist.ProcessGroup) -> BatchChannel:
    """The way to the ranks of a gloo group from its rank 0; all of them call this together.

    A ring when every rank could attach to it, for which it must be on rank 0's host.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    writer = RingWriter(RingShape(num_readers=size - 1)) if rank == 0 else None
    offer: list[Any] = [writer.address if writer else None]
    dist.broadcast_object_list(offer, group=group, group_src=0)
    end, obstacle = (writer, "") if writer else _attach(offer[0], rank)
    obstacles = [""] * size
    dist.all_gather_object(obstacles, obstacle, group=group)
    if writer:
        writer.seal()
    if end and not any(obstacles):
        return RingChannel(end)
    if rank == 0:
        logger.warning("batches are shared by gloo, not through shared memory: %s", "; ".join(filter(None, obstacles)))
    return GlooChannel(group)


def _attach(address: RingAddress, rank: int) -> tuple[RingReader | None, str]:
    """This rank's end of the ring, or why it can have none."""
    try:
        return RingReader(address, rank), ""
    except OSError as error:
        return None, f"rank {rank}: {error}"
