"""The block pool keeps its books after every operation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.sequence import Sequence
from tests.engine.sequences import make_sequence

NUM_BLOCKS, BLOCK_SIZE = 8, 4


class Pool(RuleBasedStateMachine):
    """Grows and frees sequences in any order and compares the pool with plain arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.tokens: list[tuple[Sequence, int]] = []  # covered so far

    def num_held(self) -> int:
        return sum(-(-covered // BLOCK_SIZE) for _, covered in self.tokens)

    @rule(num_tokens=st.integers(1, 40), reserve=st.integers(0, 3))
    def start(self, num_tokens: int, reserve: int) -> None:
        seq = make_sequence(len(self.tokens), prompt=1)
        fits = self.num_held() + -(-num_tokens // BLOCK_SIZE) + reserve <= NUM_BLOCKS
        assert self.blocks.can_allocate(seq, num_tokens, reserve) == fits
        if fits:
            self.blocks.allocate(seq, num_tokens)
            self.tokens.append((seq, num_tokens))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.integers(1, 9))
    def grow(self, data: st.DataObject, more: int) -> None:
        index = data.draw(st.integers(0, len(self.tokens) - 1))
        seq, covered = self.tokens[index]
        before = list(seq.block_table)
        if self.blocks.can_allocate(seq, covered + more):
            self.blocks.allocate(seq, covered + more)
            assert seq.block_table[: len(before)] == before
            self.tokens[index] = (seq, covered + more)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq, _ = self.tokens.pop(data.draw(st.integers(0, len(self.tokens) - 1)))
        self.blocks.free(seq)
        assert seq.block_table == []

    @invariant()
    def books_are_right(self) -> None:
        self.blocks.check_invariants(seq for seq, _ in self.tokens)
        assert self.blocks.num_used_blocks == self.num_held()
        assert self.blocks.num_free_blocks == NUM_BLOCKS - self.num_held()
        for seq, covered in self.tokens:
            assert len(seq.block_table) == -(-covered // BLOCK_SIZE)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_block_freed_longest_ago_is_taken_first() -> None:
    blocks = BlockManager(num_blocks=6, block_size=1)
    first, second = make_sequence(0, 1), make_sequence(1, 1)
    blocks.allocate(first, 3)
    blocks.allocate(second, 3)
    blocks.free(second)
    blocks.free(first)
    blocks.allocate(first, 6)
    assert first.block_table == [5, 4, 3, 2, 1, 0]


def test_allocating_what_is_not_there_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    seq = make_sequence(0, 1)
    with pytest.raises(AssertionError):
        blocks.allocate(seq, 9)
    blocks.check_invariants([seq])
    assert blocks.num_free_blocks == 2


@pytest.mark.parametrize("damage", ["leak", "double free", "shared without a count"])
def test_check_invariants_sees_damage(damage: str) -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    seq, other = make_sequence(0, 1), make_sequence(1, 1)
    blocks.allocate(seq, 8)
    if damage == "leak":
        seq.block_table.pop()
    elif damage == "double free":
        blocks.free_blocks.append(seq.block_table[0])
    else:
        other.block_table.append(seq.block_table[0])
    with pytest.raises(AssertionError):
        blocks.check_invariants([seq, other])
