"""Which tokens may be drawn, and the cheapest way to draw them: the policy between the model's logits and `ops.sample`.

The counter of a row's random numbers is the index that the drawn token will have in its sequence (prompt and completion), so
neither preemption nor resumption changes a draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer import ops
from batchinfer.engine.batch import Batch, BatchArrays


def sample_tokens(logits: Tensor, batch: Batch, step: BatchArrays[Tensor]) -> Tensor:
    """The next token of each row of logits [N, V]: [N] int64. `step` is `batch` on the logits' device.

    Logits of tokens that may not come yet (what would end a sequence below its min_tokens) are overwritten.
    """
    possible = batch.forbidden[batch.forbidden[:, 1] < logits.shape[1]]  # a stop token id may be no token of this model
    if len(possible):
        row, token = torch.from_numpy(possible).to(logits.device, torch.int64).unbind(1)
        logits[row, token] = -torch.inf
    if not batch.temperature.any():
        return logits.argmax(-1)
    return ops.sample(logits, step.temperature, step.top_k, step.top_p, step.min_p, step.seeds, step.sample_positions)
