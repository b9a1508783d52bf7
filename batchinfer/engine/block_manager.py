"""The pool of KV-cache blocks: which sequence holds which, and which are free.

Paging after Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023). Plain
integers, no torch: a block is an index into the tensors that `model_runner` allocates. The key and value of token i of a
sequence lie in slot `block_table[i // block_size] * block_size + i % block_size`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from batchinfer.engine.sequence import Sequence


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens, reference counted; the block freed longest ago is handed out first."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self.free_blocks = deque(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self.free_blocks)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks to add to the table of `seq` so that it covers `num_tokens` tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(seq.block_table))

    def can_allocate(self, seq: Sequence, num_tokens: int, reserve: int = 0) -> bool:
        """Whether `allocate` would succeed and leave at least `reserve` blocks free."""
        return self.num_missing_blocks(seq, num_tokens) + reserve <= len(self.free_blocks)

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        """Grow the table of `seq` to cover `num_tokens` tokens. Ask `can_allocate` first: it takes all blocks or fails."""
        missing = self.num_missing_blocks(seq, num_tokens)
        assert missing <= len(self.free_blocks), "allocate() without can_allocate()"
        for _ in range(missing):
            block = self.free_blocks.popleft()
            self.ref_counts[block] = 1
            seq.block_table.append(block)

    def free(self, seq: Sequence) -> None:
        """Drop every reference of `seq`; its last blocks become free first, since a shared prefix is worth keeping longest."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks.append(block)
        seq.block_table = []

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Every block is either free, once, or held as often as it is counted. `sequences`: all that hold blocks.

        Raises AssertionError. Costs some 50 ns a block: for tests, and for moments when the engine idles.
        """
        counts = [0] * self.num_blocks
        for seq in sequences:
            assert len(set(seq.block_table)) == len(seq.block_table), f"sequence {seq.request.request_id} holds a block twice"
            for block in seq.block_table:
                counts[block] += 1
        assert counts == self.ref_counts, "blocks are counted differently from how they are held"
        free = set(self.free_blocks)
        assert len(free) == len(self.free_blocks), "a block is free twice"
        assert len(free) == counts.count(0), "a block is neither free nor held"
        assert all(counts[block] == 0 for block in free), "a free block is in a block table"
