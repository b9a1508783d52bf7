"""Which tokens the sequences with a grammar may draw next: bit masks, filled by llguidance's threads.

A sequence's matcher has consumed every token that the host knows of it, so neither preemption nor prefix caching touches it.
A step's masks are made after the tokens before it were collected and before its own are drawn, while the device computes.
Without a sequence that has a grammar nothing here runs, and llguidance is not imported.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchinfer.engine.sampler import TokenMask
from batchinfer.engine.sequence import Sequence

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

WORD_BITS = 32


class GrammarMasks:
    """Makes the masks of one engine's steps, in a buffer that lasts until the next step's."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._buffer = np.empty((0, 0), dtype=np.int32)
        self._ends = np.empty(0, dtype=np.int32)  # the mask of the end-of-sequence tokens

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(torch.get_num_threads())  # this rank's share of the host

    def fill(self, places: list[tuple[int, Sequence]]) -> TokenMask:
        """The masks of sequences that have a grammar, each with its row among those of the step that draw a token.

        A matcher that fails here allows the end alone, which `follow` will not let pass for one.
        """
        if len(places) > len(self._buffer):
            self._allocate(places)
        bitmask = self._buffer[: len(places)]
        matchers = [(seq.matcher, index) for index, (_, seq) in enumerate(places) if seq.matcher is not None]
        self._executor.unsafe_compute_mask_ptr(matchers, bitmask.ctypes.data, bitmask.strides[0], len(bitmask))
        for words, (_, seq) in zip(bitmask, places, strict=True):
            if seq.request.sampling.ignore_eos and (words & ~self._ends).any():  # what can only end ends all the same
                words &= ~self._ends
        return TokenMask(np.array([row for row, _ in places]), bitmask)

    def _allocate(self, places: list[tuple[int, Sequence]]) -> None:
        """Pinned where there is a GPU, so that the copy to it makes no host wait."""
        grammar = places[0][1].request.grammar
        assert grammar is not None, "masks are for sequences with a grammar"
        rows, words = max(len(places), 2 * len(self._buffer)), -(-grammar.vocab_size // WORD_BITS)
        self._buffer = torch.empty((rows, words), dtype=torch.int32, pin_memory=torch.cuda.is_initialized()).numpy()
        ends = np.zeros(words * WORD_BITS, dtype=np.uint8)
        ends[[token for token in self._eos_token_ids if token < grammar.vocab_size]] = 1
        self._ends = np.packbits(ends, bitorder="little").view(np.int32)


def follow(matcher: LLMatcher, token_id: int) -> str | None:
    """Let a matcher consume a drawn token. Returns why it cannot: it has met a limit, or no token of the model goes on."""
    matcher.consume_token(token_id)  # its answer is not enough: a matcher that failed while its mask was made takes the end
    return matcher.get_error() if matcher.is_error() else None
