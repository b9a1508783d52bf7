"""How fast tile attention is, beside PyTorch's own attention where both compute the same.

Prefills, chunks behind cached tokens, and prefixes that decode rows share. Times are medians over replays of a CUDA graph that
goes through several sets of inputs. FLOPs count what the mask lets through. The ceiling is a large matrix product of this run.

    python slurm/bench/kernels_tile_attention.py [part of the names of cases] [alone]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchinfer.ops.compiled import load_kernels

TILE_ROWS, BLOCK, SEES_ALL = 128, 16, 2**30
SETS, REPLAYS = 4, 12

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    chunks: tuple[tuple[int, int], ...]  # (query rows, context) of every sequence
    shared: bool = False  # the rows of the one sequence are decode rows that share its keys
    split: int = 0  # keys of a part, 0: not split

    @property
    def flops(self) -> float:
        pairs = sum(rows * context if self.shared else rows * context - rows * (rows - 1) / 2 for rows, context in self.chunks)
        return 4.0 * self.heads * self.head_dim * pairs


CASES = [
    Case("prefill 1 x 2048", 32, 32, 128, ((2048, 2048),)),
    Case("prefill 1 x 2048, 8 kv", 32, 8, 128, ((2048, 2048),)),
    Case("prefill 4 x 2048", 32, 8, 128, ((2048, 2048),) * 4),
    Case("prefill 1 x 8192", 32, 32, 128, ((8192, 8192),)),
    Case("prefill 1 x 8192, D 64", 32, 32, 64, ((8192, 8192),)),
    Case("prefill 4 x 500", 32, 8, 128, ((500, 500),) * 4),
    Case("prefill 40 x 200", 32, 8, 128, ((200, 200),) * 40),
    Case("prefill 512 behind 1024", 32, 8, 128, ((512, 1536),)),
    Case("prefill 4 x 512 behind 1024", 32, 8, 128, ((512, 1536),) * 4),
    Case("300 rows over 1024", 32, 32, 128, ((300, 1024),), True),
    Case("300 rows over 1024, 8 kv", 32, 8, 128, ((300, 1024),), True),
    Case("64 rows over 1024", 32, 32, 128, ((64, 1024),), True),
    Case("64 rows over 1024, 8 kv", 32, 8, 128, ((64, 1024),), True),
    Case("4 rows over 1024", 32, 32, 128, ((4, 1024),), True),
    Case("4 rows over 1024, parts of 256", 32, 32, 128, ((4, 1024),), True, 256),
    Case("4 rows over 1024, 8 kv", 32, 8, 128, ((4, 1024),), True),
    Case("4 rows over 1024, 8 kv, parts of 128", 32, 8, 128, ((4, 1024),), True, 128),
    Case("32 x 4 rows over 1024, 8 kv", 32, 8, 128, ((4, 1024),) * 32, True),
]


def items_of(case: Case) -> tuple[Tensor, Tensor, int]:
    """The tiles, the rows and the number of partial slots."""
    items, start, slots = [], 0, 0
    for sequence, (rows, context) in enumerate(case.chunks):
        for first in range(0, rows, TILE_ROWS):
            count = min(TILE_ROWS, rows - first)
            position = SEES_ALL if case.shared else context - rows + first
            end = context if case.shared else position + count
            step = case.split or end
            for low in range(0, end, step):
                slot = slots if case.split else -1
                items.append([start + first, count, sequence, low, min(end, low + step), position, slot, 0])
                slots += count if case.split else 0
        start += rows
    items.sort(key=lambda item: item[3] - item[4])
    tiles = torch.tensor(items, dtype=torch.int32, device="cuda")
    return tiles, torch.arange(start, dtype=torch.int32, device="cuda"), slots


def ours(case: Case) -> list[Call]:
    tiles, rows, slots = items_of(case)
    blocks_each = [-(-context // BLOCK) for _, context in case.chunks]
    shape = (sum(blocks_each), case.kv_heads, BLOCK, case.head_dim)
    calls: list[Call] = []
    for _ in range(SETS):
        order = torch.randperm(shape[0], dtype=torch.int32, device="cuda").split(blocks_each)
        tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).contiguous()
        q = torch.randn(len(rows), case.heads, case.head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "kv")
        out, part = torch.empty_like(q), torch.empty(slots, case.heads, case.head_dim, device="cuda")
        lse = torch.empty(slots, case.heads, device="cuda")
        arguments = (q, k, v, tables, tiles, rows, out, part, lse, case.head_dim**-0.5, 0)
        calls.append(partial(torch.ops.batchinfer.tile_attention, *arguments))
    return calls


def theirs(case: Case, backend: SDPBackend) -> list[Call] | None:
    """PyTorch's attention over dense keys, where it can: sequences of one length, causal from their beginning or shared."""
    rows, context = case.chunks[0]
    if case.split or len(set(case.chunks)) > 1 or (rows != context and not case.shared):
        return None
    calls: list[Call] = []
    for _ in range(SETS):
        shapes = [
            (len(case.chunks), heads, n, case.head_dim) for heads, n in ((case.heads, rows), *[(case.kv_heads, context)] * 2)
        ]
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        calls.append(partial(dense_attention, backend, not case.shared, q, k, v))
    return calls


def dense_attention(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def time_us(calls: list[Call]) -> float:
    """Of one call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * 2:
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / (2 * len(calls)))
    return statistics.median(times[2:])


def ceiling() -> float:
    """TFLOP/s of a large matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / time_us([lambda: a @ b]) / 1e6


def main() -> None:
    load_kernels()
    most = ceiling()
    print(f"{torch.cuda.get_device_name()}: matrix product {most:.0f} TFLOP/s")
    print(f"{'case':38} {'us':>8} {'TFLOP/s':>8} {'of ceiling':>10}   {'cuDNN us':>8} {'TFLOP/s':>8}   {'flash us':>8} TFLOP/s")
    for case in CASES:
        if len(sys.argv) > 1 and sys.argv[1] not in case.name:
            continue
        taken = time_us(ours(case))
        line = f"{case.name:38} {taken:8.1f} {case.flops / taken / 1e6:8.1f} {case.flops / taken / 1e4 / most:9.1f}%"
        for backend in () if "alone" in sys.argv else (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            try:
                calls = theirs(case, backend)
                taken = 0.0 if calls is None else time_us(calls)
            except RuntimeError:
                taken = 0.0
            line += f"   {taken:8.1f} {case.flops / taken / 1e6:8.1f}" if taken else "   " + " " * 17
        print(line, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
