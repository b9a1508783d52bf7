"""The scheduler keeps its limits at every step, starves nobody, and agrees with a slow and obvious simulation."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.scheduler import ScheduledBatch, Scheduler
from batchinfer.engine.sequence import Sequence
from tests.engine.sequences import make_sequence


def make_scheduler(num_blocks: int = 64, block_size: int = 4, max_num_seqs: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, budget, max_model_len=num_blocks * block_size)


def advance(scheduler: Scheduler, batch: ScheduledBatch) -> list[Sequence]:
    """Do what the engine does after a step, with token 0 for every draw; return what has finished."""
    finished = []
    for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
        seq.num_computed_tokens += count
        if seq.num_computed_tokens == seq.num_tokens:
            seq.token_ids.append(0)
            if seq.num_completion_tokens == seq.request.sampling.max_tokens:
                scheduler.finish(seq)
                finished.append(seq)
    return finished


@dataclass
class Simulation:
    """The policy again, by counting: no block tables, no shortcuts. Sequences are [id, known tokens, computed tokens]."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    waiting: list[list[int]] = field(default_factory=list)
    running: list[list[int]] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # id -> blocks

    def free(self) -> int:
        return self.num_blocks - sum(self.held.values())

    def step(self) -> list[tuple[int, int]]:
        chosen: list[tuple[int, int]] = []
        for seq in list(self.running):
            if seq in self.running and seq[1] - seq[2] == 1:
                needed = -(-seq[1] // self.block_size)
                while seq in self.running and needed - self.held[seq[0]] > self.free():
                    victim = self.running.pop()
                    del self.held[victim[0]]
                    victim[2] = 0
                    self.waiting.insert(0, victim)
                if seq in self.running:
                    self.held[seq[0]] = needed
                    chosen.append((seq[0], 1))
        decoding = {request_id for request_id, _ in chosen}
        for seq in self.running:
            left = self.budget - sum(count for _, count in chosen)
            if seq[0] not in decoding and left:
                chosen.append((seq[0], min(left, seq[1] - seq[2])))
        while self.waiting and len(self.running) < self.max_num_seqs:
            left = self.budget - sum(count for _, count in chosen)
            needed = -(-self.waiting[0][1] // self.block_size)
            spare = self.num_blocks // 100 if self.running else 0
            if not left or needed + spare > self.free():
                break
            seq = self.waiting.pop(0)
            self.running.append(seq)
            self.held[seq[0]] = needed
            chosen.append((seq[0], min(left, seq[1])))
        return chosen

    def advance(self, chosen: list[tuple[int, int]], finished: set[int]) -> None:
        for request_id, count in chosen:
            seq = next(s for s in self.running if s[0] == request_id)
            seq[2] += count
            if seq[2] == seq[1]:
                seq[1] += 1
        self.remove(finished)

    def remove(self, ids: set[int]) -> None:
        self.waiting = [s for s in self.waiting if s[0] not in ids]
        self.running = [s for s in self.running if s[0] not in ids]
        self.held = {request_id: blocks for request_id, blocks in self.held.items() if request_id not in ids}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([6, 9, 24, 250]),
    block_size=st.sampled_from([1, 3, 4]),
    max_num_seqs=st.integers(1, 9),
    budget=st.integers(1, 24),
)
def test_equals_the_simulation_and_keeps_its_limits(
    seed: int, num_blocks: int, block_size: int, max_num_seqs: int, budget: int
) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, block_size, max_num_seqs, budget)
    simulation = Simulation(num_blocks, block_size, max_num_seqs, budget)
    capacity = min(num_blocks * block_size, 30)
    live: dict[int, Sequence] = {}
    to_come = 14
    for step in range(4000):
        for _ in range(min(to_come, rng.choice([0, 0, 1, 5]))):
            prompt = rng.randint(1, capacity - 1)
            seq = make_sequence(to_come, prompt, max_tokens=rng.randint(1, capacity - prompt))
            scheduler.add(seq)
            simulation.waiting.append([to_come, prompt, 0])
            live[to_come] = seq
            to_come -= 1
        if live and rng.random() < 0.03:
            request_id = rng.choice(sorted(live))
            scheduler.finish(live.pop(request_id))
            simulation.remove({request_id})
        scheduler.check_invariants()
        assert scheduler.has_work() == bool(live)
        if not live:
            if not to_come:
                return
            continue
        batch = scheduler.schedule()
        scheduler.check_invariants()
        check_limits(batch, max_num_seqs, budget)
        chosen = [(s.request.request_id, n) for s, n in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)]
        assert chosen == simulation.step(), f"step {step}"
        finished = {seq.request.request_id for seq in advance(scheduler, batch)}
        simulation.advance(chosen, finished)
        live = {request_id: seq for request_id, seq in live.items() if request_id not in finished}
    raise AssertionError(f"sequences {sorted(live)} have starved")


def check_limits(batch: ScheduledBatch, max_num_seqs: int, budget: int) -> None:
    ids = [seq.request.request_id for seq in batch.sequences]
    assert ids and len(set(ids)) == len(ids) <= max_num_seqs
    assert min(batch.num_scheduled_tokens) >= 1 and batch.num_tokens <= budget
    for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
        assert seq.num_computed_tokens + count <= seq.num_tokens
    assert not set(ids) & {seq.request.request_id for seq in batch.preempted}


def test_decode_rows_go_first_and_chunks_take_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(budget=16)
    for i, prompt in enumerate([4, 30, 20]):
        scheduler.add(make_sequence(i, prompt))
    plan = []
    for _ in range(5):
        batch = scheduler.schedule()
        plan.append(dict(zip([s.request.request_id for s in batch.sequences], batch.num_scheduled_tokens, strict=True)))
        advance(scheduler, batch)
    assert plan == [{0: 4, 1: 12}, {0: 1, 1: 15}, {0: 1, 1: 3, 2: 12}, {0: 1, 1: 1, 2: 8}, {0: 1, 1: 1, 2: 1}]


def test_a_step_with_no_spare_block_preempts_the_youngest_and_it_returns_first() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=16)
    old, young, later = make_sequence(0, 8), make_sequence(1, 8), make_sequence(2, 1)
    for seq in (old, young, later):
        scheduler.add(seq)
    advance(scheduler, scheduler.schedule())
    batch = scheduler.schedule()
    assert batch.preempted == [young] and batch.sequences == [old]
    assert list(scheduler.waiting) == [young, later]
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
    [(0, 8, "at least one token"), (40, 8, "model.max_model_len"), (30, 8, "do not fit the KV cache of 32 tokens")],
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
