"""The block pool keeps its books after every operation, and the prefix cache finds what was there and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.sequence import Sequence
from tests.engine.sequences import make_sequence, sequence_of

NUM_BLOCKS, BLOCK_SIZE = 8, 3

Tokens = tuple[int, ...]


class Pool(RuleBasedStateMachine):
    """Sequences of few different tokens come, share, grow, register and go in any order.

    The model beside it knows of every block which tokens were stored in it, those before them included, and by which of
    these a block may be found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, prefix_caching=True)
        self.live: list[Sequence] = []
        self.stored: dict[int, list[Tokens]] = {}  # block -> for each slot, all tokens up to the one whose key it holds
        self.registered: dict[Tokens, int] = {}
        self.next_id = 0

    def held(self) -> set[int]:
        return {block for seq in self.live for block in seq.block_table}

    def take(self, seq: Sequence, num_tokens: int, prefix: list[int]) -> None:
        """Allocate, and store what the new blocks are for."""
        before = [*seq.block_table, *prefix]
        registered_free = [b for b in self.blocks.free_blocks if b in self.registered.values() and b not in prefix]
        self.blocks.allocate(seq, num_tokens, prefix)
        assert seq.block_table[: len(before)] == before
        new = seq.block_table[len(before) :]
        given_up = [block for block in new if block in registered_free]
        assert given_up == registered_free[: len(given_up)], "content was given up out of turn"
        self.registered = {tokens: block for tokens, block in self.registered.items() if block not in new}
        for block in new:
            self.stored[block] = []
        for position in range(num_tokens):
            stored, tokens = self.stored[seq.block_table[position // BLOCK_SIZE]], tuple(seq.token_ids[: position + 1])
            if position % BLOCK_SIZE < len(stored):
                assert stored[position % BLOCK_SIZE] == tokens, "a sequence reads what is not its own"
            else:
                stored.append(tokens)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), reserve=st.integers(0, 2), most=st.integers(0, 20))
    def start(self, tokens: list[int], reserve: int, most: int) -> None:
        seq = sequence_of(self.next_id, tokens)
        expected = []
        for end in range(BLOCK_SIZE, min(most, len(tokens)) + 1, BLOCK_SIZE):
            if tuple(tokens[:end]) not in self.registered:
                break
            expected.append(self.registered[tuple(tokens[:end])])
        prefix = self.blocks.find_prefix(tokens, most)
        assert prefix == expected
        needed = -(-len(tokens) // BLOCK_SIZE) - sum(1 for block in prefix if block in self.held())
        fits = needed + reserve <= NUM_BLOCKS - len(self.held())
        assert self.blocks.can_allocate(seq, len(tokens), prefix, reserve) == fits
        if fits:
            self.take(seq, len(tokens), prefix)
            self.live.append(seq)
            self.next_id += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        seq = data.draw(st.sampled_from(self.live))
        missing = -(-(len(seq.token_ids) + len(more)) // BLOCK_SIZE) - len(seq.block_table)
        fits = missing <= NUM_BLOCKS - len(self.held())
        assert self.blocks.can_allocate(seq, len(seq.token_ids) + len(more)) == fits
        if fits:
            seq.token_ids += more
            self.take(seq, len(seq.token_ids), [])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        num_tokens = data.draw(st.integers(0, len(seq.token_ids)))
        self.blocks.register(seq, num_tokens)
        for index in range(num_tokens // BLOCK_SIZE):
            tokens, block = tuple(seq.token_ids[: (index + 1) * BLOCK_SIZE]), seq.block_table[index]
            if self.registered.setdefault(tokens, block) != block:
                break

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.blocks.free(seq)
        assert seq.block_table == [] and seq.num_cached_blocks == 0

    @invariant()
    def books_are_right(self) -> None:
        self.blocks.check_invariants(self.live)
        assert self.blocks.num_used_blocks == len(self.held())
        assert self.blocks.num_free_blocks == NUM_BLOCKS - len(self.held())
        assert sorted(self.blocks.cached_blocks.values()) == sorted(self.registered.values())
        for tokens, block in self.registered.items():
            assert self.stored[block][-1] == tokens and len(self.stored[block]) == BLOCK_SIZE


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def registered_sequence(blocks: BlockManager, request_id: int, token_ids: list[int]) -> Sequence:
    """A sequence that holds blocks for its tokens, all full ones registered."""
    seq = sequence_of(request_id, token_ids)
    blocks.allocate(seq, len(token_ids), blocks.find_prefix(token_ids, len(token_ids)))
    blocks.register(seq, len(token_ids))
    return seq


def test_what_cannot_be_found_is_taken_first_and_then_what_was_used_longest_ago() -> None:
    blocks = BlockManager(num_blocks=6, block_size=2, prefix_caching=True)
    first, second = registered_sequence(blocks, 0, [1, 2, 3, 4, 5]), registered_sequence(blocks, 1, [6, 7, 8])
    assert (first.block_table, second.block_table) == ([0, 1, 2], [3, 4])
    blocks.free(second)
    blocks.free(first)
    assert list(blocks.free_blocks) == [2, 4, 5, 3, 1, 0]


def test_a_hit_is_used_anew() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2, prefix_caching=True)
    for i, token_ids in enumerate([[1, 1], [2, 2], [3, 3], [4, 4]]):
        blocks.free(registered_sequence(blocks, i, token_ids))
    blocks.free(registered_sequence(blocks, 4, [1, 1]))
    registered_sequence(blocks, 5, [5, 5])
    assert blocks.find_prefix([1, 1], 2) and not blocks.find_prefix([2, 2], 2)


def test_a_shared_prefix_outlives_what_follows_it() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1, prefix_caching=True)
    for i, token_ids in enumerate([[1, 2, 3], [1, 2, 4]]):
        blocks.free(registered_sequence(blocks, i, token_ids))
    blocks.allocate(make_sequence(2, 1), 2)
    assert len(blocks.find_prefix([1, 2, 3], 3)) == 2


def test_equal_blocks_at_different_places_are_different() -> None:
    blocks = BlockManager(num_blocks=6, block_size=2, prefix_caching=True)
    registered_sequence(blocks, 0, [1, 1, 2, 2])
    assert blocks.find_prefix([2, 2, 1, 1], 4) == []
    assert len(blocks.find_prefix([1, 1, 1, 1], 4)) == 1


def test_only_one_block_stands_for_a_content_and_nothing_hangs_on_the_others() -> None:
    blocks = BlockManager(num_blocks=6, block_size=1, prefix_caching=True)
    first = registered_sequence(blocks, 0, [1, 2])
    second = sequence_of(1, [1, 2, 3])
    blocks.allocate(second, 3, blocks.find_prefix([1, 2, 3], 1))
    blocks.register(second, 3)
    assert second.num_cached_blocks == 1 and blocks.find_prefix([1, 2, 3], 3) == first.block_table
    blocks.free(first)
    blocks.allocate(first, 3)  # all that is left, block 1 of the first included
    blocks.register(second, 3)
    assert blocks.find_prefix([1, 2, 3], 3) == second.block_table
    blocks.check_invariants([first, second])


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1)
    seq = registered_sequence(blocks, 0, [1, 2])
    assert seq.num_cached_blocks == 0 and blocks.find_prefix([1, 2], 2) == []


def test_allocating_what_is_not_there_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    seq = make_sequence(0, 1)
    with pytest.raises(AssertionError):
        blocks.allocate(seq, 9)
    blocks.check_invariants([seq])
    assert blocks.num_free_blocks == 2


@pytest.mark.parametrize(
    "damage",
    [
        "leak",
        "double free",
        "shared without a count",
        "key without a block",
        "wrong key",
        "prefix forgotten",
        "prefix to be taken first",
        "content to be taken first",
        "unknown to its holder",
    ],
)
def test_check_invariants_sees_damage(damage: str) -> None:
    blocks = BlockManager(num_blocks=8, block_size=2, prefix_caching=True)
    seq, other, gone = (registered_sequence(blocks, i, [i] * 4) for i in range(3))
    blocks.free(gone)
    blocks.check_invariants([seq, other])
    if damage == "leak":
        seq.block_table.pop()
    elif damage == "double free":
        blocks.free_blocks[seq.block_table[0]] = None
    elif damage == "shared without a count":
        other.block_table.append(seq.block_table[0])
    elif damage == "key without a block":
        blocks.cached_blocks[b"8 bytes and a block"] = 7
    elif damage == "wrong key":
        seq.token_ids[3] = 9
    elif damage == "prefix forgotten":
        blocks._forget(seq.block_table[0])
    elif damage == "prefix to be taken first":
        blocks.free_blocks.move_to_end(blocks.find_prefix([2] * 4, 4)[1])
    elif damage == "content to be taken first":
        blocks.free_blocks.move_to_end(7)
    else:
        seq.num_cached_blocks = 1
    with pytest.raises(AssertionError):
        blocks.check_invariants([seq, other])
