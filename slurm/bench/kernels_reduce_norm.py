"""The sum over ranks with residual add and norm, beside NCCL's all-reduce with the same norm behind it, by size of the message.

    python -m torch.distributed.run --standalone --nproc-per-node=2 slurm/bench/kernels_reduce_norm.py [--size 4096]

Microseconds of one call among many in a CUDA graph, the slowest rank's median over replays. `push` and `split` are the two ways
of the kernel, forced; `NCCL` is the all-reduce alone, `NCCL, norm` what the model would otherwise run. The link's own limit
is the bytes that must leave a rank over what NVLink carries one way.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from batchinfer import ops
from batchinfer.model.parallel import TensorParallel, init_distributed
from batchinfer.model.peer_exchange import connect
from batchinfer.ops import peer_memory

CALLS, REPLAYS, EPS = 40, 9, 1e-5
LINK_BYTES_PER_US = 450e3  # NVLink 4, one way: 18 links of 25 GB/s (NVIDIA H100 whitepaper)


def microseconds(call: Callable[[], object], parallel: TensorParallel, device: torch.device) -> float:
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        dist.barrier(group=parallel.host_group)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # ranks come together in here
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    slowest = torch.tensor(sorted(times)[REPLAYS // 2])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=parallel.host_group)
    return float(slowest)


def ways(
    x: Tensor, residual: Tensor, weight: Tensor, parallel: TensorParallel, plain: TensorParallel
) -> dict[str, Callable[[], object]]:
    peers = parallel.peers
    assert peers is not None
    found: dict[str, Callable[[], object]] = {
        "NCCL": lambda: plain.all_reduce(x),
        "NCCL, norm": lambda: ops.rms_norm(plain.all_reduce(x), weight, EPS, residual),
        "norm": lambda: ops.rms_norm(x, weight, EPS, residual),
    }
    if x.nbytes <= peers.push_bytes:
        found["push"] = lambda: peer_memory.push(peers, x, residual, weight, EPS)
    for blocks in (16, 32, 64, 256):
        found[f"split {blocks}"] = partial(peer_memory.split, peers, x, residual, weight, EPS, blocks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096])
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    plain = init_distributed(device)
    peer_memory.PUSH_BYTES = dict.fromkeys(peer_memory.RANKS, 32 << 20)  # every size both ways
    parallel = connect(plain, max(args.rows), args.size, torch.bfloat16, device)
    weight = torch.ones(args.size, device=device, dtype=torch.bfloat16)
    header: list[str] = []
    for rows in args.rows:
        x = torch.randn(rows, args.size, device=device, dtype=torch.bfloat16) * 0.01
        residual = torch.randn_like(x)
        took = {name: microseconds(call, parallel, device) for name, call in ways(x, residual, weight, parallel, plain).items()}
        ranks = parallel.size
        took["link"] = 2 * x.nbytes * (ranks - 1) / ranks / LINK_BYTES_PER_US
        if parallel.rank == 0:
            if not header:
                header = list(took)
                print(f"{ranks} ranks, {torch.cuda.get_device_name()}; microseconds")
                print(f"{'bytes':>12}", *(f"{name:>11}" for name in header))
            print(f"{x.nbytes:>12,}", *(f"{took[name]:>11.1f}" if name in took else f"{'':>11}" for name in header), flush=True)
    plain.close()


if __name__ == "__main__":
    main()
