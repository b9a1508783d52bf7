"""Products where there is no GPU: the same as the reference, through the same rules."""

from __future__ import annotations

import pytest
import torch

from batchinfer.ops import reference_linear, skinny


@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_products_on_a_cpu_are_those_of_the_reference(dtype: torch.dtype, with_residual: bool) -> None:
    x, weight, norm_weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 64), (10, 64), (64,), (10,)))
    residual = torch.randn(3, 64).to(dtype) if with_residual else None
    assert not skinny.is_skinny(x, weight)
    assert torch.equal(skinny.linear(x, weight, bias), reference_linear.linear(x, weight, bias))
    for name in ("norm_linear", "norm_linear_silu"):
        ours = getattr(skinny, name)(x, residual, norm_weight, 1e-5, weight, bias)
        expected = getattr(reference_linear, name)(x, residual, norm_weight, 1e-5, weight, bias)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert torch.equal(ours[1], x if residual is None else x + residual)
