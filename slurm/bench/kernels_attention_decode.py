"""How near paged decode attention comes to reading keys and values at the device's streaming rate.

    python slurm/bench/kernels_attention_decode.py [--sweep]

Prints a line per shape: time, bytes of keys and values over time, and its share of what a sum over 2 GiB reads in the same run.
Caches hold several times the L2 cache, calls rotate among sets of blocks, times are medians of CUDA events around replays of a
CUDA graph. `--sweep` compares ways of cutting the work.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.ops.attention import DevicePlan, planned_attention
from batchinfer.ops.attention_plan import AttentionShape, plan_attention, with_tuning
from batchinfer.ops.compiled import load_kernels

BLOCK, DIM = 16, 128


@dataclass(frozen=True)
class Case:
    name: str
    contexts: list[int]
    heads: int
    kv_heads: int
    dim: int = DIM
    dtype: torch.dtype = torch.bfloat16
    prefix: int = 0  # tokens that all rows share
    chunk: int = 0  # tokens of a prompt that is computed beside the rows

    def all_contexts(self) -> list[int]:
        return self.contexts + [self.chunk] * (self.chunk > 0)

    def needs_tiles(self) -> bool:
        return self.prefix > 0 or self.chunk > 0

    def bytes(self) -> int:
        """What must be read for the rows: a shared prefix once."""
        tokens = sum(self.contexts) - self.prefix * (len(self.contexts) - 1)
        return tokens * self.kv_heads * self.dim * 2 * 2


def ragged(rows: int, low: int, high: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(low, high + 1, rows).tolist()


CASES = [
    Case("256 rows 64-1500 MHA", ragged(256, 64, 1500), 32, 32),
    Case("256 rows 64-1500 G=4", ragged(256, 64, 1500), 32, 8),
    Case("256 rows 64-1500 G=8", ragged(256, 64, 1500), 64, 8),
    Case("256 rows 64-1500 D=64", ragged(256, 64, 1500), 32, 32, 64),
    Case("512 rows 32-256 MHA", ragged(512, 32, 256), 32, 32),
    Case("64 rows 64-1500 MHA", ragged(64, 64, 1500), 32, 32),
    Case("64 rows 64-1500 G=4", ragged(64, 64, 1500), 32, 8),
    Case("16 rows 2048 MHA", [2048] * 16, 32, 32),
    Case("16 rows 2048 G=4", [2048] * 16, 32, 8),
    Case("9 rows 2048 MHA", [2048] * 9, 32, 32),
    Case("40 rows 2048 G=4", [2048] * 40, 32, 8),
    Case("4 rows 256 MHA", [256] * 4, 32, 32),
    Case("4 rows 1024 G=4", [1024] * 4, 32, 8),
    Case("1 row 128 MHA", [128], 32, 32),
    Case("1 row 256 MHA", [256], 32, 32),
    Case("1 row 256 G=4", [256], 32, 8),
    Case("1 row 2048 MHA", [2048], 32, 32),
    Case("1 row 16384 G=4", [16384], 32, 8),
    Case("200 rows and a prompt of 512", ragged(200, 64, 1500), 32, 32, chunk=512),
    Case("200 rows and 512, G=4", ragged(200, 64, 1500), 32, 8, chunk=512),
    Case("200 rows and 2048, G=4", ragged(200, 64, 1500), 32, 8, chunk=2048),
    Case("shared 1024, 200 rows MHA", ragged(200, 1040, 1400), 32, 32, prefix=1024),
    Case("shared 1024, 200 rows G=4", ragged(200, 1040, 1400), 32, 8, prefix=1024),
    Case("shared 2048, 8 rows MHA", ragged(8, 2100, 2300), 32, 32, prefix=2048),
]

CUTS: list[dict[str, int]] = [{"waves": 1}, {"waves": 4}, {"min_piece": 2**20}]


def median_us(calls: list[Callable[[], object]], replays: int = 7) -> float:
    """Of one call: a CUDA graph of all of them is replayed, and timed by events."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def streaming_rate() -> float:
    x = torch.ones(2**30, dtype=torch.bfloat16, device="cuda")
    return x.numel() * 2 / median_us([x.sum] * 4) * 1e6


@dataclass
class Inputs:
    """A case on the device: so many disjoint sets of blocks that the L2 cache serves none of them."""

    case: Case
    q: torch.Tensor
    cache: torch.Tensor
    tables: list[np.ndarray]

    @classmethod
    def of(cls, case: Case) -> Inputs:
        needed = [-(-c // BLOCK) for c in case.all_contexts()]
        bytes_each = case.bytes()
        sets = 1 + int(120e6 // bytes_each)
        blocks = sum(needed) * sets + 1
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (2, blocks, case.kv_heads, BLOCK, case.dim)
        cache = torch.empty(shape, dtype=case.dtype, device="cuda").normal_(generator=generator)
        q = torch.randn(
            len(case.contexts) + case.chunk, case.heads, case.dim, dtype=case.dtype, device="cuda", generator=generator
        )
        ids = np.random.default_rng(0).permutation(blocks - 1).astype(np.int32) + 1
        tables = []
        for s in range(sets):
            table, begin = np.zeros((len(needed), max(needed)), np.int32), s * sum(needed)
            for row, count in enumerate(needed):
                table[row, :count] = ids[begin : begin + count]
                begin += count
            table[:, : case.prefix // BLOCK] = table[0, : case.prefix // BLOCK]
            tables.append(table)
        return cls(case, q, cache, tables)

    def time(self, **tuning: int) -> tuple[float, DevicePlan]:
        case, counts = self.case, [1] * len(self.case.contexts) + [self.case.chunk] * (self.case.chunk > 0)
        cu = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        contexts = np.array(case.all_contexts(), dtype=np.int32)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        shape = with_tuning(AttentionShape(BLOCK, case.heads, case.kv_heads, sms), **tuning)
        k, v = self.cache.transpose(2, 3).unbind(0)
        calls: list[Callable[[], object]] = []
        for table in self.tables:
            host = plan_attention(cu, contexts, table, shape)
            plan = DevicePlan.over(host, torch.from_numpy(host.buffer).cuda(), case.heads, case.dim)
            on_device = torch.from_numpy(table).cuda()

            def call(table: torch.Tensor = on_device, plan: DevicePlan = plan) -> torch.Tensor:
                return planned_attention(self.q, k, v, table, plan, case.dim**-0.5, None)

            calls.append(call)
        while len(calls) < 8:
            calls += calls
        return median_us(calls), plan


def line(name: str, us: float, moved: int, ceiling: float, plan: DevicePlan) -> str:
    rate = moved / us * 1e6
    cut = f"parts {plan.counts.parts} x {plan.warps} warps, tiles {plan.counts.tiles}, combined {plan.counts.combine_rows}"
    return f"{name:28} {us:9.2f} us {rate / 1e9:7.0f} GB/s {100 * rate / ceiling:5.1f} %  {cut}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    load_kernels()
    ceiling = streaming_rate()
    print(f"{torch.cuda.get_device_name()}: sum over 2 GiB reads {ceiling / 1e9:.0f} GB/s")
    for case in CASES:
        if options.only not in case.name or (case.needs_tiles() and not hasattr(torch.ops.batchinfer, "tile_attention")):
            continue
        inputs = Inputs.of(case)
        settings: list[dict[str, int]] = [{}]
        if options.sweep:
            settings += [{"warps": w, **cut} for w in (2, 4, 8, 16) for cut in CUTS]
        timed = [(*inputs.time(**setting), setting) for setting in settings]
        if options.sweep:
            for us, plan, setting in sorted(timed[1:], key=lambda t: t[0])[:4]:
                print("   ", line(str(setting).replace("'", ""), us, case.bytes(), ceiling, plan))
        print(line(case.name, *timed[0][:1], case.bytes(), ceiling, timed[0][1]), flush=True)
        del inputs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
