"""Matrix products, alone and with the norm before or the activation after them, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops.reference import rms_norm, silu_and_mul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]. Returns [T, N]."""
    return torch.nn.functional.linear(x, weight, bias)


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, then `silu_and_mul`: weight [2I, K] holds gate rows, then up rows. Returns [T, I]."""
    return silu_and_mul(linear(x, weight, bias))


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x [T, K] (plus residual), then `linear`. Returns the product [T, N] and the new residual [T, K]."""
    normed, residual = _norm(x, residual, norm_weight, eps)
    return linear(normed, weight, bias), residual


def norm_linear_silu(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x (plus residual), then `linear_silu`. Returns [T, I] and the new residual."""
    normed, residual = _norm(x, residual, norm_weight, eps)
    return linear_silu(normed, weight, bias), residual


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows and the new residual."""
    done = rms_norm(x, weight, eps, residual)
    return done if isinstance(done, tuple) else (done, x)
