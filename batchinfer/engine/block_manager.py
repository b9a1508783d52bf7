"""The pool of KV-cache blocks: which sequence holds which, which are free, and which content can be found again.

Paging after Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023). Plain
integers, no torch: a block is an index into the tensors that `model_runner` allocates. The key and value of token i of a
sequence lie in slot `block_table[i // block_size] * block_size + i % block_size`.

Prefix caching: a full block can be registered under what it holds, and a later sequence that begins with the same tokens
shares it. A block's key is the prefix id of the block before it and its own tokens. Prefix ids are counted up and never
used twice, so one id stands for one chain of blocks and thereby for all tokens from the first on: a hit is an exact match,
no matter how hashes fall. A block that nobody holds keeps its content until it is handed out again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable

from batchinfer.engine.sequence import PENDING, Sequence

NO_PREFIX = 0  # the prefix id in front of a sequence's first block


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens, reference counted.

    Free blocks without content are handed out first, then those with content, least recently used first. A sequence lets
    its last block go first. Whoever holds a registered block holds all blocks before it, so of the free ones a block is
    always taken before its prefix, and what is registered can always be reached.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = False) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.ref_counts = [0] * num_blocks
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next one to take is first
        self.cached_blocks: dict[bytes, int] = {}
        self.block_keys: list[bytes | None] = [None] * num_blocks
        self.prefix_ids = [NO_PREFIX] * num_blocks  # of each registered block: the chain that ends with it
        self.last_prefix_id = NO_PREFIX

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self.free_blocks)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """The registered blocks that hold the beginning of `token_ids`: as many as there are, but `max_tokens` tokens at most."""
        blocks: list[int] = []
        prefix_id = NO_PREFIX
        for tokens in self._packed(token_ids, 0, min(max_tokens, len(token_ids)) // self.block_size):
            block = self.cached_blocks.get(_block_key(prefix_id, tokens))
            if block is None:
                break
            blocks.append(block)
            prefix_id = self.prefix_ids[block]
        return blocks

    def can_allocate(self, seq: Sequence, num_tokens: int, prefix: Collection[int] = (), reserve: int = 0) -> bool:
        """Whether `allocate` would succeed and leave at least `reserve` blocks free."""
        return self._num_to_take(seq, num_tokens, prefix) + reserve <= len(self.free_blocks)

    def allocate(self, seq: Sequence, num_tokens: int, prefix: Collection[int] = ()) -> None:
        """Grow the table of `seq` to cover `num_tokens` tokens. Ask `can_allocate` first: it takes all blocks or fails.

        `prefix`: what `find_prefix` has just found for a sequence that holds nothing yet. These blocks are shared.
        """
        assert self._num_to_take(seq, num_tokens, prefix) <= len(self.free_blocks), "allocate() without can_allocate()"
        if prefix:
            assert not seq.block_table, "only a sequence without blocks can begin with a prefix"
            self._share(seq, prefix)
        for _ in range(self.num_blocks_for(num_tokens) - len(seq.block_table)):
            block, _ = self.free_blocks.popitem(last=False)
            self._forget(block)
            self.ref_counts[block] = 1
            seq.block_table.append(block)

    def register(self, seq: Sequence, num_tokens: int) -> None:
        """Let the blocks that the first `num_tokens` tokens of `seq` fill be found by `find_prefix`.

        The step that computes these tokens must be launched before any that may use the blocks, or be the same one. Stops at
        a block whose content another block stands for already: what follows would hang on a block that `seq` does not hold.
        """
        if not self.prefix_caching:
            return
        start, stop = seq.num_cached_blocks, num_tokens // self.block_size
        if start >= stop:
            return
        table = seq.block_table
        prefix_id = self.prefix_ids[table[start - 1]] if start else NO_PREFIX
        for block, tokens in zip(table[start:stop], self._packed(seq.token_ids, start, stop), strict=True):
            key = _block_key(prefix_id, tokens)
            if self.cached_blocks.setdefault(key, block) != block:
                return
            self.last_prefix_id = self.prefix_ids[block] = prefix_id = self.last_prefix_id + 1
            self.block_keys[block] = key
            seq.num_cached_blocks += 1

    def unregister(self, seq: Sequence, num_tokens: int) -> None:
        """Take back `register` for all but the first `num_tokens` tokens of `seq`: their step was never launched.

        Sequences that found these blocks meanwhile must have freed them.
        """
        kept = num_tokens // self.block_size
        for block in seq.block_table[kept : seq.num_cached_blocks]:
            self._forget(block)
        seq.num_cached_blocks = min(kept, seq.num_cached_blocks)

    def free(self, seq: Sequence) -> None:
        """Drop every reference of `seq`, from its last block to its first."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks[block] = None
                if self.block_keys[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table = []
        seq.num_cached_blocks = 0

    def _packed(self, token_ids: list[int], start: int, stop: int) -> list[bytes]:
        """The tokens of blocks `start` to `stop`, a block at a time."""
        width = self.block_size * 4
        packed = array("i", token_ids[start * self.block_size : stop * self.block_size]).tobytes()
        return [packed[i : i + width] for i in range(0, len(packed), width)]

    def _num_to_take(self, seq: Sequence, num_tokens: int, prefix: Collection[int]) -> int:
        """Blocks that leave the free list: new ones, and those of the prefix that nobody holds."""
        held = len(seq.block_table) + sum(1 for block in prefix if self.ref_counts[block])
        return max(0, self.num_blocks_for(num_tokens) - held)

    def _share(self, seq: Sequence, prefix: Collection[int]) -> None:
        for block in prefix:
            if self.ref_counts[block] == 0:
                del self.free_blocks[block]
            self.ref_counts[block] += 1
        seq.block_table += prefix
        seq.num_cached_blocks = len(prefix)

    def _forget(self, block: int) -> None:
        key = self.block_keys[block]
        if key is not None:
            del self.cached_blocks[key]
            self.block_keys[block] = None
            self.prefix_ids[block] = NO_PREFIX

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Every block is either free, once, or held as often as it is counted; what is registered is what the holders say.

        Raises AssertionError. `sequences`: all that hold blocks. For tests, and for moments when the engine idles: some
        microseconds a block.
        """
        sequences = list(sequences)
        counts = [0] * self.num_blocks
        for seq in sequences:
            assert len(set(seq.block_table)) == len(seq.block_table), f"sequence {seq.request.request_id} holds a block twice"
            for block in seq.block_table:
                counts[block] += 1
        assert counts == self.ref_counts, "blocks are counted differently from how they are held"
        assert len(self.free_blocks) == counts.count(0), "a block is neither free nor held"
        assert all(counts[block] == 0 for block in self.free_blocks), "a free block is in a block table"
        self._check_cache()
        for seq in sequences:
            self._check_registered(seq)

    def _check_cache(self) -> None:
        registered = {block: key for block, key in enumerate(self.block_keys) if key is not None}
        assert self.cached_blocks == {key: block for block, key in registered.items()}, "keys and blocks disagree"
        assert [block for block, prefix_id in enumerate(self.prefix_ids) if prefix_id != NO_PREFIX] == list(registered)
        block_of = {self.prefix_ids[block]: block for block in registered}
        assert len(block_of) == len(registered), "two blocks have the same prefix id"
        order = {block: i for i, block in enumerate(self.free_blocks)}
        empty = [block not in registered for block in order]
        assert empty == sorted(empty, reverse=True), "a block with content would be taken before one without"
        for block, key in registered.items():
            prefix_id = int.from_bytes(key[:8], "little")
            if prefix_id == NO_PREFIX:
                continue
            before = block_of.get(prefix_id)
            assert before is not None, "a registered block cannot be reached: the one before it is not registered"
            assert self.ref_counts[before] >= self.ref_counts[block], "a block is held without its prefix"
            assert before not in order or order[before] > order[block], "a prefix would be taken before what follows"

    def _check_registered(self, seq: Sequence) -> None:
        """The registered blocks of `seq` are the first ones of its table, under the tokens that it has there."""
        prefix_id, registered = NO_PREFIX, seq.num_cached_blocks
        for block, tokens in zip(seq.block_table, self._packed(seq.token_ids, 0, registered), strict=False):
            assert self.block_keys[block] == _block_key(prefix_id, tokens), "a block is registered under what it does not hold"
            prefix_id = self.prefix_ids[block]
        assert registered <= len(seq.block_table) and PENDING not in seq.token_ids[: registered * self.block_size]
        rest = seq.block_table[registered:]
        assert all(self.block_keys[block] is None for block in rest), "a block is registered without the one before it"


def _block_key(prefix_id: int, packed_tokens: bytes) -> bytes:
    return prefix_id.to_bytes(8, "little") + packed_tokens
