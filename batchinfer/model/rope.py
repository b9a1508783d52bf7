"""The table of rotary embedding (Su et al. 2021): cosines and sines of every position, for each way of scaling.

A row of the table depends on its position alone. So a token is rotated alike in every batch, whatever chunk it came in and
whether its sequence was preempted and computed again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchinfer.model.config import ModelShape
from batchinfer.model.rope_config import DynamicRope, LinearRope, Llama3Rope, RopeScaling, YarnRope


def rotary_table(shape: ModelShape, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position: [num_positions, head_dim], computed in float64, held in float32 at least.

    YaRN's attention factor is multiplied in, as transformers does: it reaches queries and keys, and no op needs to know it.
    """
    positions = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1)
    angles = positions * _frequencies(shape.rope_theta, shape.head_dim, shape.rope_scaling, positions)
    factor = shape.rope_scaling.attention_factor if isinstance(shape.rope_scaling, YarnRope) else 1.0
    held = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1).to(device, held)


def _frequencies(theta: float, head_dim: int, scaling: RopeScaling | None, positions: Tensor) -> Tensor:
    """Radians per position of each pair of elements: [head_dim / 2], or [num_positions, head_dim / 2] where they grow."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    match scaling:
        case None:
            return theta**-exponents
        case LinearRope(factor):
            return theta**-exponents / factor
        case Llama3Rope():
            return _llama3(theta**-exponents, scaling)
        case YarnRope():
            return _yarn(theta**-exponents, theta, head_dim, scaling)
        case DynamicRope():
            return _dynamic_base(theta, head_dim, scaling, positions) ** -exponents


def _llama3(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    """Llama 3.1's scaling: wavelengths beyond the original context are `factor` times longer, short ones are kept.

    Between the two the kept share grows linearly with the number of turns within the original context.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(frequencies: Tensor, theta: float, head_dim: int, rope: YarnRope) -> Tensor:
    """YaRN (Peng et al. 2023): as above, but the kept share falls linearly with the index of the pair of elements."""

    def pair_that_turns(times: float) -> float:
        turns_of_first = rope.original_max_position_embeddings / (2 * math.pi)
        return head_dim * math.log(turns_of_first / times) / (2 * math.log(theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bounds are transformers', head_dim - 1 included, although there are half as many pairs: checkpoints rely on it.
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float64) - first) / width).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / rope.factor)


def _dynamic_base(theta: float, head_dim: int, rope: DynamicRope, positions: Tensor) -> Tensor:
    """The base of a token at each position [num_positions, 1]: that of a sequence which ends with it ("dynamic NTK").

    transformers takes the base of the longest sequence in the batch so far, for all tokens of a step; keys that are already
    in its cache keep theirs. So beyond the trained length its results depend on the batch and on how a prompt was cut. A
    token's own position is the one choice that depends on neither and is transformers' own wherever that is settled: up to
    the trained length, where nothing is scaled, and for every token that one sequence generates beyond. A prompt that is
    itself longer gives what transformers gives when it is fed token by token, not in one piece.
    """
    trained = rope.max_position_embeddings
    lengths = (positions + 1).clamp(min=trained)
    return theta * (rope.factor * lengths / trained - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
