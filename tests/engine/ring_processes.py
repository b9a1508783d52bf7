"""What the processes of the ring's tests do: a light module, because each of them imports it."""

from __future__ import annotations

import random
import time
import zlib
from multiprocessing.connection import Connection

from batchinfer.engine import ring


def read_rings(pipe: Connection) -> None:
    """For each (address, rank, pauses) from the pipe: what the ring brought until its empty message, as (size, checksum)."""
    while (job := pipe.recv()) is not None:
        address, rank, pauses = job
        reader, rng, got = ring.RingReader(address, rank), random.Random(rank), []
        pipe.send("attached")
        while (received := reader.get()).size:
            got.append((received.size, zlib.crc32(received)))
            if pauses and rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.002))
        pipe.send(got)


def write_forever(pipe: Connection, num_readers: int, size: int, poll_s: float, stall_s: float) -> None:
    """Offers a ring, and writes messages of `size` into it, each the repetition of one byte, for as long as it lives."""
    ring.POLL_S = poll_s
    writer = ring.RingWriter(ring.RingShape(num_readers, num_slots=2, slot_bytes=4096), stall_s)
    pipe.send(writer.address)
    pipe.recv()
    writer.seal()
    number = 0
    while True:
        writer.put(bytes([number % 256]) * size)
        number += 1


def read_forever(pipe: Connection, address: ring.RingAddress, rank: int) -> None:
    reader = ring.RingReader(address, rank)
    pipe.send("attached")
    while True:
        reader.get()


def wait_idly(pipe: Connection, address: ring.RingAddress, rank: int, poll_s: float) -> None:
    """Waits for one message; answers with it and the CPU seconds that the wait took."""
    ring.POLL_S = poll_s
    reader = ring.RingReader(address, rank)
    pipe.send("attached")
    begin = time.process_time()
    received = bytes(reader.get())
    pipe.send((received, time.process_time() - begin))
