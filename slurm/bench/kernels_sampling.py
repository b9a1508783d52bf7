"""What choosing tokens costs: greedy and random draws over whole vocabularies, beside the memory's own rates.

    python slurm/bench/kernels_sampling.py --rows 1 64 256 --vocabularies 32000 128256

Bytes are those of the logits, read once; the ceiling is the rate of `sum` over 2 GiB, measured first. A figure is the median over
replays of a CUDA graph of calls on different logits, several times the size of the L2 cache together where they can be. `peaked`
logits are those of a model that is sure, as most are: the likeliest token is some 20 above the common one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from batchinfer.ops import reference_logprobs, reference_sampling, sampling
from batchinfer.ops.logprobs import log_probabilities

GIB = 2**30
ROTATED_BYTES, MOST_SETS = 256 << 20, 40
KINDS: dict[str, dict[str, float]] = {
    "draw": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "k, p, min-p": {"top_k": 200, "top_p": 0.95, "min_p": 0.02},
}


def seconds_of(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Of one call, from a graph of all of them."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy (read and written) and of a sum (read)."""
    source = torch.randn(GIB, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy, total = seconds_of([lambda: target.copy_(source)]), seconds_of([lambda: source.sum()])
    return 4 * GIB / copy, 2 * GIB / total


def parameters(rows: int, kind: dict[str, float]) -> tuple[Tensor, ...]:
    def full(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    return (
        full(kind.get("temperature", 1.0)),
        full(kind.get("top_k", 0), torch.int32),
        full(kind.get("top_p", 1.0)),
        full(kind.get("min_p", 0.0)),
        torch.arange(rows, device="cuda") * 0x9E3779B97F4A7C15 % 2**62,
        torch.arange(rows, device="cuda", dtype=torch.int32),
    )


def measure(rows: int, vocab_size: int, dtype: torch.dtype, splits: list[int], read_rate: float) -> None:
    num_bytes = rows * vocab_size * dtype.itemsize
    sets = max(2, min(MOST_SETS, -(-ROTATED_BYTES // num_bytes)))
    flat = [torch.randn(rows, vocab_size, device="cuda").mul_(2).to(dtype) for _ in range(sets)]
    peaked = [logits.clone() for logits in flat]
    for logits in peaked:
        logits[:, torch.randint(0, vocab_size, (8,))] += 16

    def show(name: str, calls: list[Callable[[], object]]) -> None:
        seconds = seconds_of(calls)
        rate = num_bytes / seconds
        print(f"{name:26} {rows:4} x {vocab_size:<7} {seconds * 1e6:9.1f} us {rate / 1e9:8.0f} GB/s {rate / read_rate:7.1%}")

    for split in splits:
        show(f"greedy /{split}", [lambda x=x, s=split: sampling.greedy(x, s) for x in flat])
    show("torch.max", [lambda x=x: x.max(-1) for x in flat])
    for name, kind in KINDS.items():
        draw = partial(draw_all, parameters(rows, kind))
        for split in splits if name in ("draw", "top-p 0.9") else [0]:
            show(f"{name} /{split}", draw(flat, split))
        show(f"{name}, peaked", draw(peaked))
    chosen = torch.arange(rows, device="cuda")
    for k in (0, 20):
        show(f"log-probabilities, k {k}", [partial(log_probabilities, logits, chosen, k) for logits in flat])


def draw_all(asked: tuple[Tensor, ...], sets: list[Tensor], splits: int = 0) -> list[Callable[[], object]]:
    return [partial(sampling.draw, logits, *asked, splits) for logits in sets]


def reference(rows: int, vocab_size: int) -> None:
    """It waits for the host, so no graph holds it."""
    logits = torch.randn(rows, vocab_size, device="cuda").bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "draw": partial(reference_sampling.sample, logits, *parameters(rows, {})),
        "top-p 0.9": partial(reference_sampling.sample, logits, *parameters(rows, {"top_p": 0.9})),
        "k 20": partial(reference_logprobs.log_probabilities, logits, torch.arange(rows, device="cuda"), 20),
    }
    for name, call in calls.items():
        times = []
        for _ in range(4):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        print(f"{'reference ' + name:26} {rows:4} x {vocab_size:<7} {statistics.median(times[1:]):9.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--splits", type=int, nargs="+", default=[0], help="blocks that share a row; 0: what the kernel chooses")
    args = parser.parse_args()
    copy_rate, read_rate = ceilings()
    gpu = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    print(f"{gpu}: copy {copy_rate / 1e9:.0f} GB/s, read {read_rate / 1e9:.0f} GB/s")
    for vocab_size in args.vocabularies:
        for rows in args.rows:
            measure(rows, vocab_size, getattr(torch, args.dtype), args.splits, read_rate)
        reference(max(args.rows), vocab_size)


if __name__ == "__main__":
    main()
