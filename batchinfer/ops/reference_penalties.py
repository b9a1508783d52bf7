"""What changes logits before a token is drawn, in plain torch: masks of allowed tokens and penalties for repeated ones.

Both work in place on the rows that are named, a bounded number at a time, and touch no other row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops.precision import accumulation_dtype

CHUNK_ELEMENTS = 2**23  # logits worked on at once: temporaries take some 10 bytes for each
WORD_BITS = 32


def apply_token_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """Set the logits [N, V] of tokens that are not allowed to -inf, in place, in the M rows named.

    Bit t % 32 of word t // 32 of bitmask [M, W] int32 says that token t is allowed in row rows[m]. Tokens beyond the last
    word are not allowed, bits beyond the vocabulary mean nothing.
    """
    vocab_size, width = logits.shape[1], bitmask.shape[1] * WORD_BITS
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=logits.device)
    for part, words in _chunks(max(vocab_size, width), rows, bitmask):
        cut = ((words.unsqueeze(2) >> bits) & 1).flatten(1)[:, :vocab_size] == 0
        cut = torch.nn.functional.pad(cut, (0, max(0, vocab_size - width)), value=True)
        logits[part] = logits[part].masked_fill(cut, -torch.inf)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    sample_seqs: Tensor,
    prompt_lens: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalise the tokens that a sequence holds already in logits [N, V], in place, in the M rows named.

    Row n draws for sequence s = sample_seqs[n], whose context_lens[s] (1 or more) tokens lie in the blocks of token_cache
    [blocks, block_size] that block_tables[s] [B] names in order; the first prompt_lens[n] of them are its prompt. The other
    arguments are [N]. First repetition (Keskar et al. 2019), over all tokens: a positive logit is divided by it, another one
    multiplied. Then of tokens after the prompt only: minus presence, minus frequency times how often the token came.
    """
    max_context = block_tables.shape[1] * token_cache.shape[1]
    places = torch.arange(max_context, device=logits.device)
    for (part,) in _chunks(max(logits.shape[1], max_context), rows):
        seqs = sample_seqs[part]
        tokens = token_cache[block_tables[seqs]].flatten(1).long()  # [m, B * block_size]
        # Past its end a sequence repeats its first token: that one is penalised twice in the same way, and nothing is counted.
        tokens = torch.where(places < context_lens[seqs].unsqueeze(1), tokens, tokens[:, :1])
        generated = (places >= prompt_lens[part].unsqueeze(1)) & (places < context_lens[seqs].unsqueeze(1))
        counts = torch.zeros(len(part), logits.shape[1], dtype=torch.int32, device=logits.device)
        counts = counts.scatter_add_(1, tokens, generated.int()).gather(1, tokens)
        at = (part.unsqueeze(1), tokens)
        wide = logits[at].to(accumulation_dtype(logits.dtype))
        repeated, present, frequent = (p[part].to(wide.dtype).unsqueeze(1) for p in (repetition, presence, frequency))
        wide = torch.where(wide < 0, wide * repeated, wide / repeated)
        wide -= frequent * counts + present * (counts > 0)
        logits[at] = wide.to(logits.dtype)


def _chunks(elements_each: int, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Pieces of at most CHUNK_ELEMENTS elements of tensors that share their first dimension."""
    size = max(1, CHUNK_ELEMENTS // elements_each)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
