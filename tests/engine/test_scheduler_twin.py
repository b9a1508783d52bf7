"""The scheduler and the block manager, step by step against a slow and obvious twin, over a device that remembers.

Sequences come at random, share prefixes, are aborted and end by chance; pools are small, so that they are preempted. The
device holds for every slot the name of the whole history that its key and value belong to, and the next token is a function
of that history: a block that was shared, evicted or registered wrongly shows at once.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.scheduler import ScheduledBatch, Scheduler
from batchinfer.engine.sequence import PENDING, Sequence
from tests.engine.scheduler_twin import Twin, TwinRow, TwinStep
from tests.engine.sequences import sequence_of

VOCAB = 3
EOS = 0


@dataclass(frozen=True)
class Setting:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool
    overlap: bool
    max_model_len: int = 34

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have; the last one is never computed."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)


class Device:
    """Stores for every slot a name of its history: all tokens up to the one whose key and value lie there."""

    def __init__(self, num_slots: int) -> None:
        self.names: dict[tuple[int, int], int] = {}
        self.slots = [-1] * num_slots

    def history(self, token_ids: list[int]) -> list[int]:
        """For each token, the name of all tokens up to it."""
        name, names = -1, []
        for token_id in token_ids:
            name = self.names.setdefault((name, token_id), len(self.names))
            names.append(name)
        return names

    def draw(self, token_ids: list[int], seed: int) -> int:
        return zlib.crc32(bytes(token_ids), seed) % VOCAB


@dataclass
class World:
    """What the engine does around the scheduler, in its order, with the twin and the device beside it."""

    setting: Setting
    seed: int
    live: dict[int, Sequence] = field(default_factory=dict)
    on_device: dict[int, list[int]] = field(default_factory=dict)  # token ids of each sequence, pending ones too
    in_flight: list[list[Sequence]] = field(default_factory=list)  # the sequences that drew a token, for each unread step
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        setting = self.setting
        self.rng = random.Random(self.seed)
        blocks = BlockManager(setting.num_blocks, setting.block_size, setting.prefix_caching)
        self.scheduler = Scheduler(blocks, setting.max_num_seqs, setting.budget, setting.max_model_len)
        self.twin = Twin(setting.num_blocks, setting.block_size, setting.max_num_seqs, setting.budget, setting.prefix_caching)
        self.device = Device(setting.num_blocks * setting.block_size)
        self.templates = [[self.rng.randrange(VOCAB) for _ in range(setting.longest)] for _ in range(2)]

    def arrive(self, request_id: int) -> None:
        prompt = self.rng.randint(1, self.setting.longest - 1)
        shared = self.rng.randint(0, prompt)
        token_ids = self.rng.choice(self.templates)[:shared] + [self.rng.randrange(VOCAB) for _ in range(prompt - shared)]
        max_tokens = self.rng.randint(1, self.setting.longest - prompt)
        prompt_logprobs = self.rng.choice([None, None, None, 0, 2])
        seq = sequence_of(
            request_id,
            token_ids,
            seed=self.rng.choice([0, 0, request_id]),
            max_tokens=max_tokens,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=self.rng.random() < 0.6,
        )
        self.scheduler.add(seq)
        self.live[request_id], self.on_device[request_id] = seq, list(token_ids)
        self.twin.waiting.append(TwinRow(request_id, seq.token_ids, prompt, prompt + max_tokens, prompt_logprobs is not None))
        self.counts["prompt_tokens"] += prompt
        self.counts["longest_road"] += prompt + max_tokens

    def finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.twin.remove(self.twin.row(seq.request.request_id))
        del self.live[seq.request.request_id]

    def abort(self) -> None:
        seq = self.rng.choice(list(self.live.values()))
        self.counts["unread_prompt_tokens"] += max(0, seq.num_prompt_tokens - seq.num_prefilled_tokens)
        self.counts["aborted_in_flight"] += any(seq in drawn for drawn in self.in_flight)
        self.finish(seq)

    def step(self) -> None:
        oldest = next((seq for seq in self.scheduler.running.values() if seq.num_tokens < seq.max_num_tokens), None)
        batch = self.scheduler.schedule()
        self.scheduler.check_invariants()
        expected = self.twin.step()
        self.compare(batch, expected)
        self.check_limits(batch)
        assert oldest is None or oldest in batch.sequences, "the oldest must always go on"
        self.counts["steps"] += 1
        self.counts["empty"] += not batch.sequences
        self.counts["preempted"] += len(batch.preempted)
        self.counts["prefix_hit_tokens"] += batch.prefix_hit_tokens
        assert batch.sequences or any(self.in_flight), "nothing to do and nothing to wait for"
        self.launch(batch)
        while len(self.in_flight) > self.setting.overlap:
            self.collect(self.in_flight.pop(0))
        self.scheduler.check_invariants()

    def compare(self, batch: ScheduledBatch, expected: TwinStep) -> None:
        chosen = [
            (seq.request.request_id, seq.num_computed_tokens, count)
            for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)
        ]
        assert chosen == expected.chosen
        assert [seq.request.request_id for seq in batch.preempted] == expected.preempted
        assert batch.prefix_hit_tokens == expected.prefix_hit_tokens
        assert list(self.scheduler.waiting) == [row.request_id for row in self.twin.waiting]
        assert list(self.scheduler.running) == [row.request_id for row in self.twin.running]
        assert self.scheduler.blocks.num_free_blocks == len(self.twin.free)
        assert len(self.scheduler.blocks.cached_blocks) == sum(1 for block in self.twin.pool if block.history)

    def check_limits(self, batch: ScheduledBatch) -> None:
        assert batch.num_tokens <= self.setting.budget and len(self.scheduler.running) <= self.setting.max_num_seqs
        assert not {id(seq) for seq in batch.sequences} & {id(seq) for seq in batch.preempted}
        for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
            assert 1 <= count <= seq.num_tokens - seq.num_computed_tokens
            assert seq.num_tokens < seq.max_num_tokens or seq.num_tokens == seq.num_prompt_tokens
            if seq.request.sampling.prompt_logprobs is not None:
                assert seq.num_computed_tokens <= seq.num_prefilled_tokens, "a prompt token would never be computed"

    def launch(self, batch: ScheduledBatch) -> None:
        """Store and read on the device, and move the marks on, as `Engine.step` does before it reads any token."""
        work = list(zip(batch.sequences, batch.num_scheduled_tokens, strict=True))
        for seq, count in work:
            history = self.device.history(self.on_device[seq.request.request_id])
            for position in range(seq.num_computed_tokens, seq.num_computed_tokens + count):
                self.device.slots[self.slot(seq, position)] = history[position]
        drawn = []
        for seq, count in work:
            start, prompt = seq.num_computed_tokens, seq.num_prompt_tokens
            token_ids = self.on_device[seq.request.request_id]
            slots = [self.device.slots[self.slot(seq, position)] for position in range(start + count)]
            assert slots == self.device.history(token_ids)[: start + count], "a sequence reads what is not its own"
            self.counts["prefill_tokens"] += len(range(max(start, seq.num_prefilled_tokens), min(start + count, prompt)))
            seq.num_computed_tokens += count
            seq.num_prefilled_tokens = max(seq.num_prefilled_tokens, seq.num_computed_tokens)
            row = self.twin.row(seq.request.request_id)
            row.computed, row.ever_computed = seq.num_computed_tokens, seq.num_prefilled_tokens
            if seq.num_computed_tokens == seq.num_tokens:
                seq.token_ids.append(PENDING)  # the twin's row shares the list
                token_ids.append(self.device.draw(token_ids, seq.request.seed))
                drawn.append(seq)
        self.in_flight.append(drawn)

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.setting.block_size
        return seq.block_table[position // size] * size + position % size

    def collect(self, drawn: list[Sequence]) -> None:
        for seq in drawn:
            if seq.request.request_id not in self.live:
                continue
            index = seq.token_ids.index(PENDING)
            token_id = seq.token_ids[index] = self.on_device[seq.request.request_id][index]
            if (token_id == EOS and not seq.request.sampling.ignore_eos) or index + 1 == seq.max_num_tokens:
                self.finish(seq)


def run(setting: Setting, seed: int, num_sequences: int = 14) -> World:
    """Everything that comes ends, and in time: the oldest one moves on at every step in which it has not its last token."""
    world = World(setting, seed)
    to_come = num_sequences
    while to_come or world.live:
        for _ in range(min(to_come, world.rng.choice([0, 0, 1, 5]))):
            world.arrive(to_come)
            to_come -= 1
        if world.live and world.rng.random() < 0.04:
            world.abort()
        assert world.scheduler.has_work() == bool(world.live)
        if world.live:
            world.step()
        assert world.counts["steps"] <= world.counts["longest_road"] + 2 * num_sequences, f"{sorted(world.live)} have starved"
    counts = world.counts
    assert counts["prefill_tokens"] + counts["prefix_hit_tokens"] + counts["unread_prompt_tokens"] == counts["prompt_tokens"]
    assert world.scheduler.blocks.num_used_blocks == 0
    return world


@settings(max_examples=500, deadline=None)
@given(
    setting=st.builds(
        Setting,
        num_blocks=st.sampled_from([6, 9, 16, 24, 250]),
        block_size=st.sampled_from([1, 2, 3, 4]),
        max_num_seqs=st.integers(1, 9),
        budget=st.integers(1, 24),
        prefix_caching=st.booleans(),
        overlap=st.booleans(),
    ),
    seed=st.integers(0, 2**32),
)
def test_equals_the_twin_keeps_its_limits_and_starves_nobody(setting: Setting, seed: int) -> None:
    run(setting, seed)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_runs_above_see_what_they_are_for(overlap: bool) -> None:
    """Preemption, hits, aborts in flight and steps with nothing to do: without them the test above would mean little."""
    counts: Counter[str] = Counter()
    for seed in range(30):
        counts += run(Setting(12, 2, 6, 12, prefix_caching=True, overlap=overlap), seed).counts
    assert counts["preempted"] > 20 and counts["prefix_hit_tokens"] > 200
    assert (counts["empty"] > 5) == overlap and (counts["aborted_in_flight"] > 5) == overlap


def test_prefix_caching_and_overlap_change_no_token() -> None:
    for seed in range(10):
        tokens = []
        for prefix_caching, overlap in [(False, False), (True, False), (False, True), (True, True)]:
            world = World(Setting(12, 2, 6, 12, prefix_caching, overlap), seed)
            for request_id in range(8):
                world.arrive(request_id)
            sequences = dict(world.live)
            while world.live:
                world.step()
            tokens.append({request_id: seq.token_ids[:] for request_id, seq in sequences.items()})
        assert all(PENDING not in t for t in tokens[0].values())
        for other in tokens[1:]:
            for request_id, token_ids in tokens[0].items():  # one that EOS has ended may have drawn a token more
                assert [t for t in other[request_id] if t != PENDING] == token_ids
