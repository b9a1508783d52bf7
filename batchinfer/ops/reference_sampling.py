"""Drawing tokens from logits, in plain torch: greedy, or by the Gumbel-max trick over counter-based noise.

A row's draw depends on its logits, seed and position and on nothing else: not on the batch, the device, or a restart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops.precision import accumulation_dtype

CHUNK_ELEMENTS = 2**23  # logits worked on at once: noise and filters take some 100 bytes for each
WORD = 0xFFFFFFFF  # Philox works on unsigned 32-bit words; they lie in int64 here


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row of logits [S, V] (int32, the lowest id among equals), and which rows hold a NaN (bool)."""
    highest, token_ids = logits.max(-1)  # NaN, if there is one
    return token_ids.int(), highest.isnan()


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample`, and which rows hold a NaN: their tokens mean nothing."""
    return sample(logits, temperature, top_k, top_p, min_p, seeds, positions), logits.amax(-1).isnan()


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """One token id for each row of logits [S, V]; the other arguments are [S]. Returns [S] int64.

    Rows with temperature 0 take the likeliest token (the lowest id among equals). The others are divided by their
    temperature, cut by top-k (0: off), then top-p (1: off), then min-p (0: off), and draw argmax(logits + Gumbel noise).
    `seeds` are unsigned 64-bit numbers in int64 bits. `positions` are where the drawn tokens will stand in their sequences.
    """
    tokens = logits.argmax(-1)
    drawn = torch.nonzero(temperature > 0).flatten()
    for rows in drawn.split(max(1, CHUNK_ELEMENTS // logits.shape[1])):
        scores = logits[rows].to(accumulation_dtype(logits.dtype))
        # The maximum goes first and nothing is divided by 0, so that a tiny temperature gives 0 for it and -inf for the rest.
        heat = temperature[rows].to(scores.dtype).clamp(min=torch.finfo(scores.dtype).tiny)
        scores = (scores - scores.amax(-1, keepdim=True)) / heat.unsqueeze(1)
        scores = _filter_rows(scores, top_k[rows], top_p[rows], min_p[rows])
        noise = gumbel_noise(seeds[rows], positions[rows], scores.shape[1])
        tokens[rows] = (scores + noise.to(scores.dtype)).argmax(-1)
    return tokens


def _filter_rows(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`filter_scores` for those rows that ask for it; the others do not pay for the sort."""
    asked = ((top_k > 0) & (top_k < scores.shape[1])) | (top_p < 1) | (min_p > 0)
    rows = torch.nonzero(asked).flatten()
    if rows.numel():
        scores[rows] = filter_scores(scores[rows], top_k[rows], top_p[rows], min_p[rows])
    return scores


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set what top-k, top-p and min-p cut from scores [S, V] to -inf; each looks at what the ones before it left.

    Ties: all tokens equal to the k-th likeliest stay; of equals at the border of top-p the lower ids stay. The likeliest
    token always stays. The same sets as transformers' TopK-, TopP- and MinPLogitsWarper in this order, ties aside.
    """
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    size = scores.shape[1]
    k = torch.where(top_k > 0, top_k, size).clamp(max=size).long().unsqueeze(1)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, k - 1), -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of the likelier ones
    cut = (before >= top_p.to(scores.dtype).unsqueeze(1)) & (top_p < 1).unsqueeze(1)
    cut |= probabilities < min_p.to(scores.dtype).unsqueeze(1) * probabilities[:, :1]
    cut[:, 0] = False
    ordered = ordered.masked_fill(cut, -torch.inf)
    return torch.empty_like(scores).scatter_(1, ids, ordered)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [S, vocab_size] in float64: token t of row s gets word t % 4 of Philox block (t // 4, position)."""
    seeds, positions = seeds.long().unsqueeze(1), positions.long().unsqueeze(1)
    blocks = torch.arange(-(-vocab_size // 4), device=seeds.device).unsqueeze(0)
    zero = torch.zeros_like(seeds)
    words = philox4x32((blocks, positions & WORD, zero, zero), (seeds & WORD, (seeds >> 32) & WORD))
    uniform = (words.flatten(1)[:, :vocab_size].double() + 0.5) / 2**32  # inside (0, 1), never at its ends
    return -torch.log(-torch.log(uniform))


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10) -> Tensor:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011). Words are int64 tensors in 0..2^32-1 that broadcast. Returns [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The products wrap to negative numbers; their bits are those of the unsigned products.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((second >> 32) & WORD) ^ c1 ^ k0, second & WORD, ((first >> 32) & WORD) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
