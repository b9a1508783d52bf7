"""The sum over ranks with its norm against plain torch: both ways, odd sizes, mixed calls, graphs in any order, equal bits."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from batchinfer import ops
from batchinfer.model.parallel import TensorParallel
from batchinfer.model.peer_exchange import connect
from batchinfer.ops import reference
from tests.gpu.ranks import run_ranks, sizes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not sizes(), reason="fewer than two CUDA GPUs")]

EPS = 1e-5
MAX_ROWS = 2048


def summand(seed: int, rank: int, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """With zeros of both signs in it, since those are what an empty slot holds."""
    generator = torch.Generator(device).manual_seed(1000 * seed + rank)
    made = torch.randn(rows, size, generator=generator, device=device)
    made[torch.rand(rows, size, generator=generator.manual_seed(seed), device=device) < 0.1] = -0.0
    return made.to(dtype)


def kept_rows(parallel: TensorParallel, x: Tensor) -> list[int]:
    """The rows whose residual this rank keeps up."""
    if parallel.peers is None or x.nbytes <= parallel.peers.push_bytes:
        return list(range(len(x)))
    each = -(-len(x) // parallel.size)
    return list(range(len(x)))[parallel.rank * each : (parallel.rank + 1) * each]


def reduce(parallel: TensorParallel, x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    if len(pieces := parallel.pieces(len(x))) > 1:
        for index in range(len(pieces)):
            parallel.give(index)
    return parallel.reduce_norm(x, residual, weight, EPS)


def compare(parallel: TensorParallel, device: torch.device, seed: int, rows: int, size: int, dtype: torch.dtype) -> None:
    """Two sums in a row, the second onto the residual of the first."""
    weight = summand(seed + 1, 99, 1, size, dtype, device)[0]
    residual = exact_residual = None
    for call in range(2):
        every = [summand(seed + call, rank, rows, size, dtype, device) for rank in range(parallel.size)]
        x = every[parallel.rank].clone()  # it may become the residual
        y, residual = reduce(parallel, x, residual, weight)
        exact = sum(part.double() for part in every) + (0 if exact_residual is None else exact_residual.double())
        kept = kept_rows(parallel, x)
        eps = torch.finfo(dtype).eps
        assert isinstance(exact, Tensor)
        once = parallel.peers is not None and dtype != torch.float32  # else it is rounded before the residual is added, too
        torch.testing.assert_close(residual[kept].double(), exact[kept], rtol=eps, atol=(0.01 if once else 8) * eps)
        exact_residual = exact.to(dtype)
        normed = reference.rms_norm(exact_residual.double(), weight.double(), EPS)
        torch.testing.assert_close(y.double(), normed, rtol=4 * eps, atol=16 * eps)
        others = [torch.empty_like(y) for _ in range(parallel.size)]
        dist.all_gather(others, y.clone())
        assert all(torch.equal(other, y) for other in others), "ranks hold different bits"


def shapes_and_types(parallel: TensorParallel, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (64, 200, 4096, 5120, 8192):
            connected = connect(parallel, MAX_ROWS, size, dtype, device)
            assert connected.peers is not None
            largest_pushed = connected.peers.push_bytes // (size * dtype.itemsize)
            for rows in (1, 2, 3, 7, 133, 512, MAX_ROWS, min(largest_pushed, MAX_ROWS), min(largest_pushed + 1, MAX_ROWS)):
                compare(connected, device, rows, rows, size, dtype)


def by_nccl(parallel: TensorParallel, device: torch.device) -> None:
    """Without memory in common: whole, and in pieces."""
    for dtype in (torch.bfloat16, torch.float32):
        connected = connect(parallel, MAX_ROWS, 4096, dtype, device, peer_memory=False)
        for rows in (1, 133, 1023, 1024, 1337, MAX_ROWS):
            compare(connected, device, rows, rows, 4096, dtype)


def without_peers(parallel: TensorParallel, device: torch.device) -> None:
    """NCCL's sum gives the same up to its rounding."""
    x = summand(1, parallel.rank, 33, 512, torch.float32, device)
    connected = connect(parallel, 64, 512, torch.float32, device)
    weight = torch.ones(512, device=device)
    ours, total = connected.reduce_norm(x, None, weight, EPS)
    plain, plain_total = parallel.reduce_norm(x.clone(), None, weight, EPS)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(total, plain_total)
    assert connected.peers is not None and connect(parallel, 64, 511, torch.float32, device).peers is None


def graphs_in_any_order(parallel: TensorParallel, device: torch.device) -> None:
    """Calls of all sizes are captured, then replayed as they come, with plain calls in between."""
    dtype, size = torch.bfloat16, 4096
    connected = connect(parallel, MAX_ROWS, size, dtype, device)
    weight = torch.ones(size, device=device, dtype=dtype)
    captured = {}
    for rows in (1, 2, 16, 256, 1000, 2000):
        x = torch.zeros(rows, size, device=device, dtype=dtype)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y, residual = reduce(connected, x, None, weight)
            z, _ = reduce(connected, y.clone(), residual, weight)
            out = z.clone()
        captured[rows] = (graph, x, out)
    shuffled = random.Random(0)
    for turn in range(100):
        rows = shuffled.choice(list(captured))
        every = [summand(turn, rank, rows, size, dtype, device) for rank in range(parallel.size)]
        graph, x, out = captured[rows]
        x.copy_(every[parallel.rank])
        out.fill_(torch.nan)
        graph.replay()
        total = sum(part.float() for part in every).to(dtype)  # type: ignore[union-attr]
        first = reference.rms_norm(total, weight, EPS)
        exact, _ = reference.rms_norm(first * parallel.size, weight, EPS, total)
        torch.testing.assert_close(out, exact, rtol=3e-2, atol=3e-2)
        if turn % 7 == 0:
            compare(connected, device, turn, turn % 40 + 1, size, dtype)


@pytest.mark.parametrize("size", sizes())
@pytest.mark.parametrize("work", [shapes_and_types, by_nccl, without_peers, graphs_in_any_order])
def test_on_ranks(size: int, work: object) -> None:
    run_ranks(size, work)  # type: ignore[arg-type]


def test_capacities() -> None:
    assert ops.peer_capacities(2, 16, 8192) == (16 * 8192, 16 * 8192)
