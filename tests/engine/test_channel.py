"""Two ranks of one host share batches through the ring; ranks that cannot, by gloo; and both give what was sent."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as mp

from batchinfer.engine import ring
from batchinfer.engine.batch import HEADER_WORDS, Batch
from batchinfer.engine.channel import BatchChannel, GlooChannel, RingChannel, open_channel
from batchinfer.model.parallel import init_distributed
from tests.engine.engines import CPU

SIZES = [(1, 1, 1, 1), (7, 3, 2, 0), (2000, 512, 300, 512), (3, 2, 600_000, 2)]  # the last is longer than the ring


def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    made = [Batch.empty(*sizes) for sizes in SIZES]
    for batch in made:
        batch.buffer[HEADER_WORDS:] = rng.integers(0, 1 << 30, batch.buffer.size - HEADER_WORDS)
    return made


def exchange(channel: BatchChannel, rank: int) -> None:
    if rank == 0:
        for batch in batches():
            channel.send(batch)
            batch.buffer[:] = 0  # what was sent is no longer the sender's
        channel.send_stop()
        return
    received = []
    while (batch := channel.receive()) is not None:
        received.append(batch)
    assert len(received) == len(SIZES)
    for got, sent in zip(received, batches(), strict=True):
        np.testing.assert_array_equal(got.buffer, sent.buffer)
        np.testing.assert_array_equal(got.block_tables, sent.block_tables)


def run_rank(rank: int, size: int, port: int, log: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logging.basicConfig(filename=log.with_suffix(f".{rank}"))
    parallel = init_distributed(CPU)
    assert parallel.host_group is not None
    near = open_channel(parallel.host_group)
    assert isinstance(near, RingChannel)
    exchange(near, rank)
    if rank == 2:
        ring.boot_id = lambda: "another host's"
    far = open_channel(parallel.host_group)
    assert isinstance(far, GlooChannel)
    exchange(far, rank)
    parallel.close()


def test_the_ring_within_a_host_and_gloo_between_hosts(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, args=(3, port, tmp_path / "log"), nprocs=3)
    (line,) = (tmp_path / "log.0").read_text().splitlines()
    _, _, reason = line.partition("batches are shared by gloo, not through shared memory: ")
    assert reason == "rank 2: rank 0 is on another host or in another namespace of processes"
    assert "gloo" not in (tmp_path / "log.1").read_text()


def test_each_end_of_a_ring_does_its_own_part() -> None:
    writer = ring.RingWriter(ring.RingShape(1))
    reader = ring.RingReader(writer.address, 1)
    with pytest.raises(AssertionError, match="only rank 0 sends"):
        RingChannel(reader).send_stop()
    with pytest.raises(AssertionError, match="nobody to receive from"):
        RingChannel(writer).receive()
    writer.seal()
