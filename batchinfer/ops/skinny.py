"""Matrix products on a GPU: few rows by a kernel that reads weights at the memory's rate, others by cuBLAS.

The same functions as `reference_linear.py`. With a few rows the norm before a product and the activation after it are
done inside it, which saves small kernels that cost as much as a tenth of a step.

The kernel may read weights before the kernel just before it has ended: no such kernel may write them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops.compiled import load_kernels
from batchinfer.ops.elementwise import rms_norm, silu_and_mul

MAX_ROWS = 16  # above, every block's reading of x costs so much that cuBLAS is faster
MAX_NORM_ROWS = 2  # every block norms all rows for itself: for 4 that costs more than a kernel of its own
MAX_NORM_ELEMENTS = 8192  # of the normed rows, which threads hold in registers
UNIT = 64  # the kernel takes contraction indices in such pieces


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]. Returns [T, N]."""
    if not is_skinny(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    _launch(out, x, weight, bias)
    return out


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, then `silu_and_mul`: weight [2I, K] holds gate rows, then up rows. Returns [T, I]."""
    if not is_skinny(x, weight):
        return silu_and_mul(linear(x, weight, bias))
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    _launch(out, x, weight, bias, silu=True)
    return out


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x [T, K] (plus residual), then `linear`. Returns the product [T, N] and the new residual [T, K]."""
    if not norms_inside(x, weight):
        normed, residual = norm(x, residual, norm_weight, eps)
        return linear(normed, weight, bias), residual
    out = x.new_empty(x.shape[0], weight.shape[0])
    return out, _launch_normed(out, x, residual, norm_weight, eps, weight, bias, silu=False)


def norm_linear_silu(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x (plus residual), then `linear_silu`. Returns [T, I] and the new residual."""
    if not norms_inside(x, weight):
        normed, residual = norm(x, residual, norm_weight, eps)
        return linear_silu(normed, weight, bias), residual
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return out, _launch_normed(out, x, residual, norm_weight, eps, weight, bias, silu=True)


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` with or without a residual; the new one is x where there was none."""
    if residual is None:
        return rms_norm(x, weight, eps), x  # type: ignore[return-value]  # a tensor, since no residual was given
    return rms_norm(x, weight, eps, residual)  # type: ignore[return-value]  # a pair, since one was


def is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes this product: up to MAX_ROWS rows of a half type on a GPU, K a multiple of UNIT."""
    fits = 0 < x.shape[0] <= MAX_ROWS and x.shape[1] % UNIT == 0 and weight.is_contiguous()
    dense = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return fits and dense and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def norms_inside(x: Tensor, weight: Tensor) -> bool:
    """Whether it pays and fits to norm x inside the product."""
    return is_skinny(x, weight) and x.shape[0] <= MAX_NORM_ROWS and x.numel() <= MAX_NORM_ELEMENTS


def _launch(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool = False) -> None:
    load_kernels()
    torch.ops.batchinfer.skinny_linear(out, x, weight, bias, None, None, None, 0.0, silu)


def _launch_normed(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
) -> Tensor:
    """Returns the new residual: memory of its own, since other blocks still read the old one."""
    load_kernels()
    new = None if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    torch.ops.batchinfer.skinny_linear(out, x, weight, bias, residual, new, norm_weight, eps, silu)
    return x if new is None else new
