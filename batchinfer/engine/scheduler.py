"""Which sequences run in the next step, and how many tokens of each: continuous batching with chunked prefill.

Iteration-level scheduling after Yu et al., "Orca" (2022); prefill chunks that share a step's token budget with decode rows
after Agrawal et al., "Sarathi-Serve" (2024). Plain Python over dicts, no torch; the cost of a step is proportional to the
sequences that run.

A sequence is admitted when blocks for all its known tokens are free, and gets them all at once: so only a decode row can
run out of blocks. Then the youngest running sequence gives up its blocks and waits at the front of the queue, to be computed
again. The oldest one always goes on, hence everything ends.

Blocks are registered in the prefix cache when the chunk that fills them is scheduled: a step stores all its keys and values
of a layer before it attends, so even a sequence of the same step may share them. Generated tokens are registered when their
sequence is preempted, which is when somebody will ask for them again.

The engine may schedule a step before it has read the tokens of the one before. Then the last token of a decode row is
PENDING, and a row that has all its tokens but the pending one stays in `running`, idle, until that one is read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.sequence import PENDING, Sequence, SequenceStatus

WATERMARK = 0.01  # share of the blocks that admission leaves free for the growth of what runs already


@dataclass(slots=True)
class ScheduledBatch:
    """One step: `num_scheduled_tokens[i]` tokens of `sequences[i]`, from its `num_computed_tokens` on.

    A sequence draws a token in this step if all its tokens are computed after it. `prefix_hit_tokens` prompt tokens of the
    admitted sequences were never computed for them, because the prefix cache had them. Without sequences there is nothing
    to do until the tokens of the step in flight are read.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    prefix_hit_tokens: int = 0

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.sequences.append(seq)
        self.num_scheduled_tokens.append(num_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)


class Scheduler:
    """Sequences in, batches out. `waiting` is served first in, first out; `running` stands in order of admission."""

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        self.blocks = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.watermark = int(WATERMARK * block_manager.num_blocks)
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. ValueError, one sentence: it could not be completed even if it were alone."""
        prompt, longest = seq.num_prompt_tokens, seq.max_num_tokens
        if prompt == 0:
            raise ValueError("a prompt needs at least one token")
        if seq.request.sampling.max_tokens < 1:
            raise ValueError(f"max_tokens={seq.request.sampling.max_tokens}: a completion has at least one token")
        if prompt + 1 > self.max_model_len:
            raise ValueError(
                f"a prompt of {prompt:,} tokens leaves no room for a token: prompt and completion together may have "
                f"{self.max_model_len:,} (model.max_model_len)"
            )
        if seq.num_tokens >= longest:
            raise ValueError(f"{seq.num_completion_tokens:,} completion tokens are given, and there is room for no more")
        if self.blocks.num_blocks_for(longest - 1) > self.blocks.num_blocks:  # the last token is never computed
            capacity = self.blocks.num_blocks * self.blocks.block_size
            raise ValueError(
                f"{prompt:,} prompt tokens and up to {longest - prompt:,} new ones do not fit the KV cache of {capacity:,} tokens"
            )
        self.waiting[seq.request.request_id] = seq

    def schedule(self) -> ScheduledBatch:
        """Choose the next step: decode rows, then chunks of what is partly prefilled, then new sequences."""
        batch = ScheduledBatch()
        partial = self._schedule_decodes(batch)
        budget = self.max_num_batched_tokens - len(batch.sequences)
        budget = self._schedule_chunks(batch, partial, budget)
        if not batch.preempted:  # what a preempted one gave up is for the rows that ran out of blocks
            self._admit(batch, budget)
        return batch

    def _schedule_decodes(self, batch: ScheduledBatch) -> list[Sequence]:
        """Add every sequence that lacks only its last token; return the others, which are still in prefill.

        These rows alone never exceed the budget: the step that admitted the last of them had a token for each.
        """
        block_size, running = self.blocks.block_size, SequenceStatus.RUNNING
        sequences, partial = batch.sequences, []
        for seq in list(self.running.values()):
            if seq.status is not running:  # preempted by an older one in this loop
                continue
            num_tokens = len(seq.token_ids)
            if num_tokens >= seq.max_num_tokens:  # its last token is being drawn
                continue
            if num_tokens - seq.num_computed_tokens > 1:
                partial.append(seq)
            elif num_tokens <= len(seq.block_table) * block_size or self._grow(seq, batch):
                sequences.append(seq)
        batch.num_scheduled_tokens += [1] * len(sequences)
        return partial

    def _grow(self, seq: Sequence, batch: ScheduledBatch) -> bool:
        """Give `seq` the block its next token needs, from the youngest ones if need be. False: it was the youngest itself."""
        while not self.blocks.can_allocate(seq, seq.num_tokens):
            if self._free_ended():
                continue
            youngest = next(other for other in reversed(self.running.values()) if other.block_table)
            self._preempt(youngest)
            batch.preempted.append(youngest)
            if youngest is seq:
                return False
        self.blocks.allocate(seq, seq.num_tokens)
        return True

    def _free_ended(self) -> bool:
        """Take the blocks of rows whose last token is drawn and not yet read: no step to come uses them. False: none had any."""
        ended = [seq for seq in self.running.values() if seq.num_tokens >= seq.max_num_tokens and seq.block_table]
        for seq in ended:
            self.blocks.free(seq)
        return bool(ended)

    def shrink(self, batch: ScheduledBatch) -> list[Sequence]:
        """Take back a scheduled batch that the device had no memory for, and allow steps half as large from here on.

        Whatever was in prefill waits again, and so do the youngest of the rest if they are too many for such a step. Returns the
        sequences that gave up their blocks.
        """
        assert batch.num_tokens > 1, "a step cannot have less than one token"
        self.max_num_batched_tokens = batch.num_tokens // 2
        self.max_num_seqs = min(self.max_num_seqs, self.max_num_batched_tokens)
        given_up = []
        for seq in reversed(list(self.running.values())):  # who shares blocks before the one who would have filled them
            if seq.num_tokens >= seq.max_num_tokens:  # its last token is being drawn
                continue
            self.blocks.unregister(seq, seq.num_computed_tokens)
            prefilling = seq.num_tokens - seq.num_computed_tokens > 1 or seq in batch.admitted
            if prefilling or len(self.running) > self.max_num_seqs:
                self._preempt(seq)
                given_up.append(seq)
        return given_up

    def _preempt(self, seq: Sequence) -> None:
        del self.running[seq.request.request_id]
        self.blocks.register(seq, seq.num_computed_tokens)
        self.blocks.free(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self.waiting[seq.request.request_id] = seq
        self.waiting.move_to_end(seq.request.request_id, last=False)

    def _schedule_chunks(self, batch: ScheduledBatch, partial: list[Sequence], budget: int) -> int:
        for seq in partial:
            if budget == 0:
                break
            budget -= self._schedule_chunk(batch, seq, budget)
        return budget

    def _schedule_chunk(self, batch: ScheduledBatch, seq: Sequence, budget: int) -> int:
        chunk = min(budget, seq.num_tokens - seq.num_computed_tokens)
        batch.add(seq, chunk)
        self.blocks.register(seq, seq.num_computed_tokens + chunk)
        return chunk

    def _admit(self, batch: ScheduledBatch, budget: int) -> None:
        """Start waiting sequences in order, each behind what the prefix cache has of it."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request_id, seq = next(iter(self.waiting.items()))
            reserve = self.watermark if self.running else 0
            prefix = self._find_prefix(seq)
            if not self.blocks.can_allocate(seq, seq.num_tokens, prefix, reserve):
                break
            del self.waiting[request_id]
            self.running[request_id] = seq
            seq.status = SequenceStatus.RUNNING
            batch.admitted.append(seq)
            self.blocks.allocate(seq, seq.num_tokens, prefix)
            seq.num_computed_tokens = len(prefix) * self.blocks.block_size
            batch.prefix_hit_tokens += max(0, min(seq.num_computed_tokens, seq.num_prompt_tokens) - seq.num_prefilled_tokens)
            budget -= self._schedule_chunk(batch, seq, budget)

    def _find_prefix(self, seq: Sequence) -> list[int]:
        """Blocks that hold the beginning of `seq`, all but its last token at most: that one's logits are what is wanted."""
        if not self.blocks.prefix_caching:
            return []
        most = seq.num_tokens - 1
        if seq.request.sampling.prompt_logprobs is not None:  # of every prompt token, so each must be computed once
            most = min(most, seq.num_prefilled_tokens)
        return self.blocks.find_prefix(seq.token_ids, most)

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands, and free its blocks."""
        queue = self.waiting if seq.status is SequenceStatus.WAITING else self.running
        del queue[seq.request.request_id]
        self.blocks.free(seq)
        seq.status = SequenceStatus.FINISHED

    def check_invariants(self) -> None:
        """The pool is consistent, what waits holds nothing, what runs holds what it has computed. For tests and idle moments."""
        self.blocks.check_invariants(self.running.values())
        assert len(self.running) <= self.max_num_seqs
        for seq in self.waiting.values():
            assert seq.status is SequenceStatus.WAITING and not seq.block_table and seq.num_computed_tokens == 0
        for seq in self.running.values():
            assert seq.status is SequenceStatus.RUNNING
            covered = len(seq.block_table) * self.blocks.block_size
            assert seq.num_computed_tokens <= covered or seq.num_tokens == seq.max_num_tokens
            assert PENDING not in seq.token_ids[:-1], "two steps are ahead of what is read"
            assert seq.num_tokens <= seq.max_num_tokens, "a sequence is longer than it may become"
