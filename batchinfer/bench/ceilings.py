"""`python -m batchinfer.bench.ceilings FOLDER`: what this device reaches when nothing stands in its way.

Streaming reads, copies, GEMMs over the model's own layer shapes as the library runs them, causal attention by PyTorch's best
backend, and all-reduces where a replica has several ranks. On CUDA each is captured in a graph, so that no launch is timed.
On a CPU the same is measured at small sizes: enough to give the floor an order of magnitude.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from batchinfer.bench.task import Task, run_side
from batchinfer.model.config import ModelShape, load_shape
from batchinfer.model.parallel import TensorParallel, init_distributed
from batchinfer.model.peer_exchange import connect
from batchinfer.publish import replace_bytes
from batchinfer.roofline import Ceilings
from batchinfer.worker.__main__ import choose_device

SIDE = "ceilings"
MIB = 1 << 20
CALLS = 40  # of an all-reduce at a time: a small one takes less than it takes to launch a graph


@dataclass(frozen=True)
class Scale:
    """How much work a measurement is."""

    stream_bytes: int
    weight_bytes: int  # of GEMMs one after the other: far more than a cache holds
    rows: tuple[int, ...]
    context: int  # of attention
    all_reduce_bytes: tuple[int, ...]
    rounds: int


GPU = Scale(
    stream_bytes=2048 * MIB,
    weight_bytes=1024 * MIB,
    rows=(1, 16, 64, 128, 256, 512, 1024, 2048),
    context=4096,
    all_reduce_bytes=(8 << 10, 128 << 10, 512 << 10, 2 * MIB, 8 * MIB, 32 * MIB),
    rounds=9,
)
CPU = Scale(
    stream_bytes=64 * MIB,
    weight_bytes=8 * MIB,
    rows=(1, 16, 64, 256),
    context=128,
    all_reduce_bytes=(8 << 10, 128 << 10),
    rounds=3,
)


@torch.inference_mode()
def measure(shape: ModelShape, dtype: torch.dtype, parallel: TensorParallel, device: torch.device, scale: Scale) -> Ceilings:
    """Every rank calls this together; what one rank does alone is the same on each."""
    return Ceilings(
        read=_read(dtype, device, scale),
        copy=_copy(dtype, device, scale),
        gemm=tuple(_gemm(shape, dtype, parallel.size, device, scale)),
        attention=_attention(shape, dtype, parallel.size, device, scale),
        all_reduce=tuple(_all_reduce(shape, dtype, parallel, device, scale)),
    )


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Of one run: the median of `rounds` on a GPU, after as many untimed ones; on a CPU, which others use too, the least."""
    if device.type != "cuda":
        return min(_wall(work) for _ in range(2 * rounds))
    graph = _captured(work)
    for _ in range(rounds):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(marks)) / 1e3


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # libraries allocate and choose in the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _wall(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _read(dtype: torch.dtype, device: torch.device, scale: Scale) -> float:
    source = torch.zeros(scale.stream_bytes // dtype.itemsize, dtype=dtype, device=device)
    return source.nbytes / seconds_of(source.sum, device, scale.rounds)


def _copy(dtype: torch.dtype, device: torch.device, scale: Scale) -> float:
    """By the better of the driver's copy and an elementwise kernel: on an H100 the latter is a fifth faster."""
    source = torch.zeros(scale.stream_bytes // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(seconds_of(way, device, scale.rounds) for way in ways)


def layer_weights(shape: ModelShape, tensor_parallel: int) -> list[tuple[int, int]]:
    """[out, in] of the GEMMs of one layer, fused as every engine fuses them."""
    local, hidden = shape.local_sizes(tensor_parallel), shape.hidden_size
    heads = local.num_heads * shape.head_dim
    qkv = heads + 2 * local.num_kv_heads * shape.head_dim
    return [(qkv, hidden), (hidden, heads), (2 * local.intermediate_size, hidden), (hidden, local.intermediate_size)]


def _gemm(
    shape: ModelShape, dtype: torch.dtype, tensor_parallel: int, device: torch.device, scale: Scale
) -> Iterator[tuple[int, float]]:
    """(rows, operations per second) of whole layers, as many of them as `weight_bytes` holds."""
    weights: list[Tensor] = []
    layer = layer_weights(shape, tensor_parallel)
    for size in cycle(layer):
        weights.append(torch.empty(size, dtype=dtype, device=device).normal_(0, 0.02))
        if len(weights) % len(layer) == 0 and sum(weight.nbytes for weight in weights) >= scale.weight_bytes:
            break
    params = sum(weight.numel() for weight in weights)
    for rows in scale.rows:
        inputs = {size: torch.randn(rows, size, dtype=dtype, device=device) for _, size in layer}

        def multiply(inputs: dict[int, Tensor] = inputs) -> None:
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

        yield rows, 2 * rows * params / seconds_of(multiply, device, scale.rounds)


def _attention(shape: ModelShape, dtype: torch.dtype, tensor_parallel: int, device: torch.device, scale: Scale) -> float:
    """Operations per second of one causal prompt, by the fastest backend that takes it."""
    heads, n = shape.local_sizes(tensor_parallel).num_heads, scale.context
    q, k, v = torch.randn(3, 1, heads, n, shape.head_dim, dtype=dtype, device=device)
    operations = 4 * heads * shape.head_dim * n * n / 2
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    best = 0.0
    for backend in backends:
        try:
            with sdpa_kernel(backend):
                took = seconds_of(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), device, scale.rounds)
        except RuntimeError:  # PyTorch's way to say that this backend cannot
            continue
        best = max(best, operations / took)
    return best


def _all_reduce(
    shape: ModelShape, dtype: torch.dtype, parallel: TensorParallel, device: torch.device, scale: Scale
) -> Iterator[tuple[int, float]]:
    """By the faster of NCCL and the kernel over memory in common, which norms as well."""
    if parallel.size == 1:
        return
    row_bytes = shape.hidden_size * dtype.itemsize
    sizes = [max(1, num_bytes // row_bytes) for num_bytes in scale.all_reduce_bytes]
    connected = connect(parallel, sizes[-1], shape.hidden_size, dtype, device)
    weight = torch.ones(shape.hidden_size, dtype=dtype, device=device)
    for rows in dict.fromkeys(sizes):
        x = torch.zeros(rows, shape.hidden_size, dtype=dtype, device=device)
        ways: list[Callable[[], object]] = [partial(parallel.all_reduce, x)]
        if connected.peers is not None:
            ways.append(partial(connected.reduce_norm, x, None, weight, 1e-5))
        yield x.nbytes, min(seconds_of(partial(_often, way), device, scale.rounds) for way in ways) / CALLS


def _often(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def work(task: Task) -> None:
    device = choose_device(task.config)
    parallel = init_distributed(device)
    scale = GPU if device.type == "cuda" else CPU
    dtype = getattr(torch, task.config.model.dtype)
    found = measure(load_shape(task.config.model), dtype, parallel, device, scale)
    if parallel.rank == 0:
        replace_bytes(task.answer_file(SIDE), json.dumps(asdict(found)).encode())
    parallel.close()


if __name__ == "__main__":
    sys.exit(run_side(work, sys.argv[1:]))
