"""The memory-bound kernels beside the copy rate of the GPU and beside the reference in plain torch.

    python slurm/bench/kernels_elementwise.py [--rows 1 16 256 512 2048] [--dtypes bfloat16 float32]

Two ceilings are measured in the same run: bytes read and written a second by a large copy, and the time of a copy of as many
bytes as the kernel moves (a launch takes some two microseconds before it reaches its rate, a copy's too). Times are medians over
replays of a CUDA graph of many launches that rotate over input sets, so that at 256 rows and more the L2 cache holds none of
them; at 1 and 16 rows it holds all. The last two tables set the fused softmax beside the three separate operations and beside
a kernel of one thread a row, with the bytes that each must move.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from batchinfer.ops import fused_softmax_attention, reference, reference_attention
from batchinfer.ops.compiled import load_kernels

ROTATED_BYTES, MOST_SETS, LAUNCHES, REPLAYS = 2**28, 64, 64, 7
HIDDEN, HEADS, DIM, INTERMEDIATE, VOCAB, BLOCK = 4096, 32, 128, 11_008, 32_000, 16
EPS = 1e-5

Launch = Callable[[int], object]  # of input set i


@dataclass(frozen=True)
class Case:
    name: str
    moved: int  # bytes, at least
    sets: int
    ours: Launch
    torch: Launch


def microseconds(launch: Launch, sets: int, launches: int = LAUNCHES) -> float:
    """Of one launch among many in a graph."""
    count = sets * -(-launches // sets)
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i % sets)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return sorted(times)[REPLAYS // 2]


def copy_rate() -> float:
    """Bytes read and written per microsecond by a copy of 2 GiB, or of 128 MiB where that is faster."""
    source = torch.randn(2**29, device="cuda").view(torch.bfloat16)
    target = torch.empty_like(source)
    whole = 2 * source.nbytes / microseconds(lambda i: target.copy_(source), 1, 4)
    return max(whole, 2**28 / copy_microseconds(2**28))


@cache
def copy_microseconds(moved: int) -> float:
    """Of a copy that moves as many bytes, read and written."""
    sets = sets_for(moved)
    source = torch.ones(sets, moved // 4, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return microseconds(lambda i: target[i].copy_(source[i]), sets)


def sets_for(moved: int) -> int:
    return max(2, min(MOST_SETS, ROTATED_BYTES // max(1, moved)))


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).to(dtype)


def norms(rows: int, dtype: torch.dtype) -> Iterator[Case]:
    weight, element = random(HIDDEN, dtype=dtype), dtype.itemsize
    row = rows * HIDDEN * element
    sets = sets_for(4 * row)
    x, residual, y, total = (random(sets, rows, HIDDEN, dtype=dtype) for _ in range(4))
    op = torch.ops.batchinfer.rms_norm
    yield Case(
        "rms_norm, residual",
        4 * row,
        sets,
        lambda i: op(y[i], x[i], weight, EPS, residual[i], total[i]),
        lambda i: reference.rms_norm(x[i], weight, EPS, residual[i]),
    )
    sets = min(sets_for(2 * row), 2 * sets)
    more, outs = torch.cat((x, residual)), torch.cat((y, total))
    yield Case(
        "rms_norm",
        2 * row,
        sets,
        lambda i: op(outs[i], more[i], weight, EPS, None, None),
        lambda i: reference.rms_norm(more[i], weight, EPS),
    )


def head_norms(rows: int, dtype: torch.dtype) -> Iterator[Case]:
    row = rows * HEADS * DIM * dtype.itemsize
    sets, weight = sets_for(2 * row), random(DIM, dtype=dtype)
    qkv, y = random(sets, rows, 2 * HEADS, DIM, dtype=dtype)[:, :, :HEADS], random(sets, rows, HEADS, DIM, dtype=dtype)
    op = torch.ops.batchinfer.rms_norm
    yield Case(
        "rms_norm, heads",
        2 * row,
        sets,
        lambda i: op(y[i], qkv[i], weight, EPS, None, None),
        lambda i: reference.rms_norm(qkv[i], weight, EPS),
    )


def ropes(rows: int, dtype: torch.dtype) -> Iterator[Case]:
    for kv_heads in (HEADS, HEADS // 4):
        yield rope(rows, dtype, kv_heads)


def rope(rows: int, dtype: torch.dtype, kv_heads: int) -> Case:
    width = (HEADS + 2 * kv_heads) * DIM
    moved = 2 * rows * width * dtype.itemsize
    sets = sets_for(moved)
    qkv, out = random(sets, rows, width, dtype=dtype), random(sets, rows, HEADS, DIM, dtype=dtype)
    parts = qkv.split([HEADS * DIM, kv_heads * DIM, kv_heads * DIM], -1)
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in parts)
    blocks = -(-sets * rows // BLOCK)
    keys, values = random(2, blocks, kv_heads, BLOCK, DIM, dtype=dtype).transpose(2, 3)
    slots = torch.randperm(blocks * BLOCK, device="cuda").int()[: sets * rows].view(sets, rows)
    positions, cos_sin = torch.randint(4096, (sets, rows), device="cuda").int(), torch.randn(4096, DIM, device="cuda")
    op = torch.ops.batchinfer.rope_and_cache

    def theirs(i: int) -> None:
        """The reference but for its selection of stored tokens, which waits for the GPU."""
        cos, sin = cos_sin.index_select(0, positions[i]).unsqueeze(1).chunk(2, dim=-1)
        place = (slots[i] // BLOCK, slots[i] % BLOCK)
        keys[place] = reference._rotate(k[i], cos, sin)
        values[place] = v[i]
        reference._rotate(q[i], cos, sin)

    return Case(
        f"rope_and_cache, {kv_heads} kv",
        moved,
        sets,
        lambda i: op(out[i], q[i], k[i], v[i], cos_sin, positions[i], keys, values, slots[i]),
        theirs,
    )


def activations(rows: int, dtype: torch.dtype) -> Iterator[Case]:
    moved = 3 * rows * INTERMEDIATE * dtype.itemsize
    sets = sets_for(moved)
    gate_up, out = random(sets, rows, 2 * INTERMEDIATE, dtype=dtype), random(sets, rows, INTERMEDIATE, dtype=dtype)
    op = torch.ops.batchinfer.silu_and_mul
    yield Case("silu_and_mul", moved, sets, lambda i: op(out[i], gate_up[i]), lambda i: reference.silu_and_mul(gate_up[i]))


def embeddings(rows: int, dtype: torch.dtype) -> Iterator[Case]:
    moved = 2 * rows * HIDDEN * dtype.itemsize
    sets, weight = sets_for(moved), random(VOCAB, HIDDEN, dtype=dtype)
    ids, out = torch.randint(VOCAB, (sets, rows), device="cuda").int(), random(sets, rows, HIDDEN, dtype=dtype)
    op = torch.ops.batchinfer.embedding
    yield Case(
        "embedding",
        moved,
        sets,
        lambda i: op(out[i], ids[i], weight, 0, VOCAB),
        lambda i: torch.index_select(weight, 0, ids[i], out=out[i]),
    )
    last, cache = torch.zeros(2048, dtype=torch.int32, device="cuda"), torch.zeros(2**16 + 1, dtype=torch.int32, device="cuda")
    slots, fed = torch.randperm(2**16, device="cuda").int()[:rows], -1 - torch.arange(rows, device="cuda").int()
    resolved, feed = torch.empty_like(fed), torch.ops.batchinfer.feed_tokens
    yield Case(
        "feed_tokens",
        16 * rows,
        2,
        lambda i: feed(resolved, fed, last, slots, cache),
        lambda i: reference.feed_tokens(fed, last, slots, cache),
    )


FAMILIES = {"norm": norms, "heads": head_norms, "rope": ropes, "silu": activations, "embedding": embeddings}


def print_kernels(families: list[str], rows: list[int], dtypes: list[str], rate: float) -> None:
    print(f"{'kernel':<24}{'dtype':<10}{'rows':>6}{'us':>9}{'GB/s':>8}{'% copy':>8}{'copy us':>9}{'torch us':>10}")
    for name in families:
        for dtype in dtypes:
            for count in rows if dtype == "bfloat16" else [r for r in rows if r >= 256]:
                for case in FAMILIES[name](count, getattr(torch, dtype)):
                    ours, theirs = microseconds(case.ours, case.sets), microseconds(case.torch, case.sets, 16)
                    print(
                        f"{case.name:<24}{dtype:<10}{count:>6}{ours:>9.2f}{case.moved / ours / 1e3:>8.0f}"
                        f"{100 * case.moved / ours / rate:>8.1f}{copy_microseconds(case.moved):>9.2f}{theirs:>10.2f}"
                    )
                torch.cuda.empty_cache()


def three_operations(scores: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return (scores * scale).masked_fill(hidden, -torch.inf).softmax(-1)


def print_softmax(rate: float) -> None:
    """[batch, heads, queries, length] of a prefill, of a chunk, and of decode rows; causal."""
    print(f"\n{'softmax':<26}{'dtype':<10}{'us':>9}{'GB/s':>8}{'% copy':>8}{'3 ops us':>10}{'naive us':>10}")
    for shape in ((1, 32, 512, 512), (1, 32, 2048, 2048), (1, 32, 512, 4096), (256, 32, 1, 1504), (1, 32, 256, 16384)):
        for dtype in (torch.bfloat16, torch.float32):
            print_softmax_of(shape, dtype, rate)


def print_softmax_of(shape: tuple[int, int, int, int], dtype: torch.dtype, rate: float) -> None:
    batch, heads, queries, length = shape
    scores = random(*shape, dtype=dtype)
    probs = torch.empty_like(scores)
    hidden = torch.ones(queries, length, dtype=torch.bool, device="cuda").triu(length - queries + 1)
    moved = (batch * heads * int((~hidden).sum()) + scores.numel()) * dtype.itemsize
    fused, naive = torch.ops.batchinfer.fused_softmax, torch.ops.batchinfer.fused_softmax_naive
    ours = microseconds(lambda i: fused(probs, scores, 0.1, None, 0), 1, 8)
    theirs = microseconds(lambda i: three_operations(scores, hidden, 0.1), 1, 4)
    slow = microseconds(lambda i: naive(probs, scores, 0.1, None, 0), 1, 2)
    print(
        f"{'x'.join(map(str, shape)):<26}{str(dtype)[6:]:<10}{ours:>9.1f}{moved / ours / 1e3:>8.0f}"
        f"{100 * moved / ours / rate:>8.1f}{theirs:>10.1f}{slow:>10.1f}"
    )


def print_attention() -> None:
    """The backend made of it beside the reference: host and GPU together, since both wait for the GPU."""
    print(f"\n{'paged attention, bf16, 32 heads of 128':<42}{'fused_softmax ms':>18}{'reference ms':>14}")
    for name, counts, contexts in (("prefill of 2048", [2048], [2048]), ("64 rows at context 1000", [1] * 64, [1000] * 64)):
        blocks = sum(-(-context // BLOCK) for context in contexts)
        q = random(sum(counts), HEADS, DIM, dtype=torch.bfloat16)
        keys, values = random(2, blocks, HEADS, BLOCK, DIM, dtype=torch.bfloat16).transpose(2, 3)
        tables = torch.randperm(blocks, device="cuda").int().view(len(counts), -1)
        begins = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
        inputs = (q, keys, values, tables, begins, torch.tensor(contexts, device="cuda").int(), DIM**-0.5)
        times = []
        for attention in (fused_softmax_attention.paged_attention, reference_attention.paged_attention):
            attention(*inputs)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(5):
                attention(*inputs)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 5)
        print(f"{name:<42}{times[0]:>18.3f}{times[1]:>14.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 512, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, "softmax", "attention"])
    args = parser.parse_args()
    load_kernels()
    torch.manual_seed(0)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: a copy moves {rate / 1e3:,.0f} GB/s")
    print_kernels([name for name in args.families if name in FAMILIES], args.rows, args.dtypes, rate)
    if "softmax" in args.families:
        print_softmax(rate)
    if "attention" in args.families:
        print_attention()


if __name__ == "__main__":
    main()
