"""The scheduler's policy in small cases that can be followed by hand. `test_scheduler_twin.py` has the large ones."""

from __future__ import annotations

import pytest

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.scheduler import ScheduledBatch, Scheduler
from batchinfer.engine.sequence import PENDING, Sequence
from tests.engine.sequences import make_sequence, sequence_of


def make_scheduler(
    num_blocks: int = 64, block_size: int = 4, max_num_seqs: int = 4, budget: int = 16, prefix_caching: bool = False
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size, prefix_caching)
    return Scheduler(blocks, max_num_seqs, budget, max_model_len=num_blocks * block_size)


def plan(batch: ScheduledBatch) -> dict[int, tuple[int, int]]:
    """Request id -> (first token, number of tokens)."""
    work = zip(batch.sequences, batch.num_scheduled_tokens, strict=True)
    return {seq.request.request_id: (seq.num_computed_tokens, count) for seq, count in work}


def advance(scheduler: Scheduler, batch: ScheduledBatch, token_id: int = 0) -> list[Sequence]:
    """Do what the engine does after a step, with one token for every draw; return what has finished. PENDING ends nothing."""
    finished = []
    for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
        seq.num_computed_tokens += count
        seq.num_prefilled_tokens = max(seq.num_prefilled_tokens, seq.num_computed_tokens)
        if seq.num_computed_tokens == seq.num_tokens:
            seq.token_ids.append(token_id)
            if token_id != PENDING and seq.num_completion_tokens == seq.request.sampling.max_tokens:
                scheduler.finish(seq)
                finished.append(seq)
    return finished


def test_decode_rows_go_first_and_chunks_take_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(budget=16)
    for i, prompt in enumerate([4, 30, 20]):
        scheduler.add(make_sequence(i, prompt))
    counts = []
    for _ in range(5):
        batch = scheduler.schedule()
        counts.append({request_id: count for request_id, (_, count) in plan(batch).items()})
        advance(scheduler, batch)
    assert counts == [{0: 4, 1: 12}, {0: 1, 1: 15}, {0: 1, 1: 3, 2: 12}, {0: 1, 1: 1, 2: 8}, {0: 1, 1: 1, 2: 1}]


def test_a_step_with_no_spare_block_preempts_the_youngest_and_it_returns_first() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=16)
    old, young, later = make_sequence(0, 8), make_sequence(1, 8), make_sequence(2, 1)
    for seq in (old, young, later):
        scheduler.add(seq)
    advance(scheduler, scheduler.schedule())
    batch = scheduler.schedule()
    assert batch.preempted == [young] and batch.sequences == [old]
    assert list(scheduler.waiting.values()) == [young, later]  # the later one is not let past it, though it would fit
    assert (young.num_computed_tokens, young.num_tokens, young.block_table, young.num_preemptions) == (0, 9, [], 1)


def test_admission_leaves_the_watermark_unless_nothing_runs() -> None:
    scheduler = make_scheduler(num_blocks=200, block_size=1, budget=400)
    scheduler.add(make_sequence(0, 100))
    scheduler.add(make_sequence(1, 99))
    assert len(scheduler.schedule().sequences) == 1  # 99 of the 100 blocks left; two are kept back
    alone = make_scheduler(num_blocks=200, block_size=1, budget=400)
    alone.add(make_sequence(0, 199, max_tokens=1))
    assert len(alone.schedule().sequences) == 1


def test_running_never_outgrows_the_token_budget() -> None:
    scheduler = make_scheduler(max_num_seqs=10, budget=3)
    for i in range(10):
        scheduler.add(make_sequence(i, 2))
    for _ in range(10):
        batch = scheduler.schedule()
        assert batch.num_tokens <= 3 and len(scheduler.running) <= 3
        advance(scheduler, batch)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 8, "a prompt needs at least one token"),
        (4, 0, "max_tokens=0"),
        (40, 8, "model.max_model_len"),
        (30, 8, "do not fit the KV cache of 32 tokens"),
    ],
)
def test_what_can_never_be_completed_is_refused(prompt: int, max_tokens: int, message: str) -> None:
    scheduler = Scheduler(BlockManager(8, 4), 4, 16, max_model_len=40)
    with pytest.raises(ValueError, match=message):
        scheduler.add(make_sequence(0, prompt, max_tokens))
    assert not scheduler.has_work()


def test_the_largest_possible_sequence_fits() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, budget=5)
    scheduler.add(make_sequence(0, 20, max_tokens=12))
    while scheduler.has_work():
        advance(scheduler, scheduler.schedule())
    scheduler.check_invariants()


def test_sequences_of_one_step_share_their_prefix() -> None:
    scheduler = make_scheduler(budget=40, prefix_caching=True)
    shared = [7] * 10
    for i in range(3):
        scheduler.add(sequence_of(i, [*shared, i, i, i]))
    batch = scheduler.schedule()
    assert plan(batch) == {0: (0, 13), 1: (8, 5), 2: (8, 5)} and batch.prefix_hit_tokens == 16
    assert scheduler.blocks.num_used_blocks == 2 + 3 * 2
    scheduler.check_invariants()


def test_one_token_is_left_to_compute() -> None:
    scheduler = make_scheduler(prefix_caching=True)
    for i in range(2):
        scheduler.add(sequence_of(i, [7] * 8))
    assert plan(scheduler.schedule()) == {0: (0, 8), 1: (4, 4)}


def test_only_what_is_scheduled_may_be_shared() -> None:
    scheduler = make_scheduler(budget=10, prefix_caching=True)
    for i in range(2):
        scheduler.add(sequence_of(i, [7] * 20))
    plans = []
    for _ in range(3):
        batch = scheduler.schedule()
        plans.append(plan(batch))
        advance(scheduler, batch)
    assert plans == [{0: (0, 10)}, {0: (10, 10)}, {0: (20, 1), 1: (16, 4)}]


def test_a_prompt_whose_log_probabilities_are_asked_is_computed_once_in_full() -> None:
    scheduler = make_scheduler(num_blocks=8, budget=64, prefix_caching=True)
    first, second = sequence_of(0, [7] * 15, max_tokens=9), sequence_of(1, [7] * 14, prompt_logprobs=0, max_tokens=9)
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert plan(batch) == {0: (0, 15), 1: (0, 14)} and batch.prefix_hit_tokens == 0
    while not second.num_preemptions:
        advance(scheduler, batch)
        batch = scheduler.schedule()
    while second.num_computed_tokens == 0:
        advance(scheduler, batch)
        batch = scheduler.schedule()
    assert plan(batch)[1][0] == 12 and batch.prefix_hit_tokens == 0


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make_scheduler(num_blocks=6, budget=64, prefix_caching=True)
    old, young = make_sequence(0, 8, max_tokens=5), make_sequence(1, 10, max_tokens=8)
    scheduler.add(old)
    scheduler.add(young)
    batch = scheduler.schedule()
    while not batch.preempted:
        advance(scheduler, batch)
        batch = scheduler.schedule()
    assert batch.preempted == [young] and young.num_tokens == 13
    finished = []
    while young not in batch.sequences:
        finished += advance(scheduler, batch)
        batch = scheduler.schedule()
    assert finished == [old] and plan(batch) == {1: (12, 1)}
    assert batch.prefix_hit_tokens == 0  # its prompt had been computed before


def test_hits_that_nobody_holds_count_as_blocks_to_take() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=64, prefix_caching=True)
    first, second = sequence_of(0, [7] * 9, max_tokens=1), sequence_of(1, [8] * 5)
    scheduler.add(first)
    assert advance(scheduler, scheduler.schedule()) == [first]
    scheduler.add(second)
    scheduler.add(sequence_of(2, [7] * 9))
    assert plan(scheduler.schedule()) == {1: (0, 5)}
    scheduler.finish(second)
    assert plan(scheduler.schedule()) == {2: (8, 1)}


def test_a_row_whose_last_token_is_unread_is_left_alone_and_gives_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4, budget=16)
    growing, ended = make_sequence(0, 3, max_tokens=5), make_sequence(1, 5, max_tokens=1)
    scheduler.add(growing)
    scheduler.add(ended)
    advance(scheduler, scheduler.schedule(), PENDING)
    batch = scheduler.schedule()
    assert batch.sequences == [growing] and ended.num_tokens == ended.max_num_tokens == 6
    growing.token_ids[3:] = [1]
    advance(scheduler, batch, PENDING)
    batch = scheduler.schedule()
    assert batch.sequences == [growing] and not batch.preempted and ended.block_table == []
    scheduler.check_invariants()
    scheduler.finish(ended)
    scheduler.check_invariants()


def test_a_step_may_have_nothing_to_do_but_to_wait() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 3, max_tokens=1))
    advance(scheduler, scheduler.schedule(), PENDING)
    batch = scheduler.schedule()
    assert not batch.sequences and not batch.preempted and scheduler.has_work()


def test_a_waiting_sequence_is_taken_out_wherever_it_stands() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    sequences = [make_sequence(i, 4) for i in range(4)]
    for seq in sequences:
        scheduler.add(seq)
    scheduler.schedule()
    scheduler.finish(sequences[2])
    assert list(scheduler.waiting.values()) == [sequences[1], sequences[3]]
