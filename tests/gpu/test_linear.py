"""Matrix products of few rows against float64: odd shapes, strided inputs, poisoned outputs, fused norm and activation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchinfer.ops import reference_linear as reference
from batchinfer.ops import skinny as ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

ROWS = (1, 2, 3, 4, 5, 8, 9, 13, 16)
SHAPES = ((12288, 4096), (4096, 11008), (1, 64), (17, 128), (100, 192), (2112, 576), (8 * 133, 64), (37, 14336))
HALVES = (torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def error(ours: Tensor, exact: Tensor) -> float:
    assert ours.isfinite().all()
    return float((ours.double() - exact).norm() / exact.norm())


def bound(dtype: torch.dtype) -> float:
    """Rounding the result once: half a unit in the last place at most, 0.6 of that on average, and some accumulation."""
    return 0.5 * float(torch.finfo(dtype).eps)


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ops allocate holds NaN until they write it."""
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape: empty(self, *shape).fill_(torch.nan))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_exact_as_their_type(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch)
    outputs, size = shape
    weight, bias = draw(outputs, size, dtype=dtype, scale=size**-0.5), draw(outputs, dtype=dtype)
    for seed, rows in enumerate(ROWS):
        torch.manual_seed(seed)
        x = draw(rows, size, dtype=dtype)
        assert ops.is_skinny(x, weight)
        exact = x.double() @ weight.double().T
        assert error(ops.linear(x, weight), exact) < bound(dtype)
        assert error(ops.linear(x, weight, bias), exact + bias.double()) < bound(dtype)


def test_rows_may_be_strided_and_other_rows_do_not_matter() -> None:
    weight = draw(515, 256, dtype=torch.bfloat16)
    wide = draw(20, 1024, dtype=torch.bfloat16)
    wide[3] = torch.nan
    x = wide[4:20, 64:320]
    assert torch.equal(ops.linear(x, weight), ops.linear(x.contiguous(), weight))
    x[5] = torch.nan
    y = ops.linear(x, weight)
    assert y[5].isnan().all() and y[:5].isfinite().all() and y[6:].isfinite().all()


def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_run() -> None:
    weight, x = draw(4096, 4096, dtype=torch.bfloat16), draw(8, 4096, dtype=torch.bfloat16)
    y = ops.linear(x, weight)
    assert all(torch.equal(ops.linear(x, weight), y) for _ in range(20))
    assert all(torch.equal(ops.linear(x[i : i + 1], weight)[0], y[i]) for i in range(8))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 7, 16))
@pytest.mark.parametrize("shape", ((12288, 4096), (22016, 4096), (34, 64), (1030, 576)))
@pytest.mark.parametrize("with_residual", (False, True))
def test_fused_products_match_the_reference(
    shape: tuple[int, int], rows: int, with_residual: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    outputs, size = shape
    weight, bias = draw(outputs, size, dtype=dtype, scale=size**-0.5), draw(outputs, dtype=dtype)
    x, norm_weight = draw(rows, 2 * size, dtype=dtype, scale=3)[:, :size], draw(size, dtype=dtype)
    residual = draw(rows, size, dtype=dtype) if with_residual else None
    for name in ("norm_linear", "norm_linear_silu"):
        y, h = getattr(ops, name)(x, residual, norm_weight, 1e-5, weight, bias)
        expected, expected_h = getattr(reference, name)(x, residual, norm_weight, 1e-5, weight, bias)
        assert torch.equal(h, expected_h)
        # Both round the normed rows, which may differ by one unit of the last place where sums fell otherwise.
        assert error(y, expected.double()) < 2 * bound(dtype)


def test_products_replay_in_a_graph() -> None:
    dtype, size = torch.bfloat16, 4096
    first, second = draw(6144, size, dtype=dtype, scale=size**-0.5), draw(size, 3072, dtype=dtype, scale=3072**-0.5)
    x, residual, norm_weight = draw(2, size, dtype=dtype), draw(2, size, dtype=dtype), draw(size, dtype=dtype)

    def chain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(8):
            y, residual = ops.norm_linear_silu(x, residual, norm_weight, 1e-5, first)
            x = ops.linear(y, second)
        return x, residual

    chain(x, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x, residual)
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(draw(2, size, dtype=dtype))
        residual.copy_(draw(2, size, dtype=dtype))
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        for ours, expected in zip(captured, chain(x, residual), strict=True):
            assert torch.equal(ours, expected)


def test_what_the_kernel_does_not_take_goes_to_torch() -> None:
    for rows, outputs, size, dtype in ((17, 64, 64, torch.bfloat16), (2, 64, 65, torch.float16), (2, 64, 64, torch.float32)):
        x, weight = draw(rows, size, dtype=dtype), draw(outputs, size, dtype=dtype)
        assert not ops.is_skinny(x, weight)
        assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))
