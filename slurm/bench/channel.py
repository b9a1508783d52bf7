"""What it costs to share one step's batch with the other ranks of a host: the ring beside gloo.

    python slurm/bench/channel.py --readers 1 3 --steps 2000

For each size of message, three times in microseconds, medians over the steps. `send`: how long rank 0 is kept. `arrival`: from
the beginning of `send` until the last reader holds its own copy; messages come 2 ms apart, so that readers are asleep, as they
are in the engine. `stream`: a message's share of the time when messages follow each other without a pause.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from batchinfer.engine.batch import HEADER_WORDS, Batch
from batchinfer.engine.channel import BatchChannel, GlooChannel, RingChannel, open_channel

SIZES = {"8 KB": 8 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20}
PAUSE_S = 0.002
WARM_UP = 50


def batch_of(num_bytes: int) -> Batch:
    """A batch of about so many bytes, most of them block tables."""
    return Batch.empty(num_tokens=1, num_seqs=1, num_blocks=num_bytes // 4 - 100 - HEADER_WORDS, num_samples=1)


def send_all(
    channel: BatchChannel, batch: Batch, steps: int, pause_s: float, group: dist.ProcessGroup
) -> list[tuple[float, float]]:
    """(beginning, end) of each `send`, on the host's monotonic clock."""
    dist.barrier(group)
    spans = []
    for _ in range(steps):
        if pause_s:
            time.sleep(pause_s)
        begin = time.monotonic()
        channel.send(batch)
        spans.append((begin, time.monotonic()))
    return spans


def receive_all(channel: BatchChannel, steps: int, group: dist.ProcessGroup) -> list[float]:
    """When each batch was there, on the host's monotonic clock."""
    dist.barrier(group)
    arrivals = []
    for _ in range(steps):
        channel.receive()
        arrivals.append(time.monotonic())
    return arrivals


def last_arrivals(arrivals: list[float], group: dist.ProcessGroup) -> list[float]:
    """For each batch, when the last rank had it."""
    latest = torch.tensor(arrivals, dtype=torch.float64)
    dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=group)
    return latest.tolist()


def measure(channel: BatchChannel, rank: int, num_bytes: int, steps: int, group: dist.ProcessGroup) -> tuple[float, float, float]:
    """send, arrival, stream in microseconds; meaningful on rank 0."""
    batch, count = batch_of(num_bytes), steps + WARM_UP
    spans = send_all(channel, batch, count, PAUSE_S, group) if rank == 0 else []
    arrivals = last_arrivals([0.0] * count if rank == 0 else receive_all(channel, count, group), group)
    stream = send_all(channel, batch, count, 0.0, group) if rank == 0 else []
    ends = last_arrivals([0.0] * count if rank == 0 else receive_all(channel, count, group), group)
    if rank != 0:
        return 0.0, 0.0, 0.0
    send_us = statistics.median(end - begin for begin, end in spans[WARM_UP:]) * 1e6
    pairs = zip(spans[WARM_UP:], arrivals[WARM_UP:], strict=True)
    arrival_us = statistics.median(arrived - begin for (begin, _), arrived in pairs) * 1e6
    stream_us = (ends[-1] - stream[WARM_UP][0]) / steps * 1e6
    return send_us, arrival_us, stream_us


def run_rank(rank: int, size: int, port: int, steps: int, results: SimpleQueue[Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    group = dist.group.WORLD
    assert group is not None
    ring = open_channel(group)
    assert isinstance(ring, RingChannel), "these processes share a host"
    for name, channel in (("gloo", GlooChannel(group)), ("ring", ring)):
        for label, num_bytes in SIZES.items():
            figures = measure(channel, rank, num_bytes, steps, group)
            if rank == 0:
                results.put((label, size - 1, name, *figures))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    print("| message | readers | channel | send | arrival | stream |\n|---|---|---|---|---|---|")
    for readers in arguments.readers:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(run_rank, args=(readers + 1, port, arguments.steps, results), nprocs=readers + 1)
        rows = [results.get() for _ in range(2 * len(SIZES))]
        for label, count, name, *figures in sorted(rows, key=lambda row: SIZES[row[0]]):
            print(f"| {label} | {count} | {name} | " + " | ".join(f"{us:,.0f}" for us in figures) + " |")


if __name__ == "__main__":
    main()
