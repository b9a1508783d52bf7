"""Which sequences run in the next step, and how many tokens of each: continuous batching with chunked prefill.

Iteration-level scheduling after Yu et al., "Orca" (2022); prefill chunks that share a step's token budget with decode rows
after Agrawal et al., "Sarathi-Serve" (2024). Plain Python over a deque and a dict, no torch; the cost of a step is
proportional to the sequences that run.

A sequence is admitted when blocks for all its known tokens are free, and gets them all at once: so only a decode row can
run out of blocks. Then the youngest running sequence gives up its blocks and waits at the front of the queue, to be computed
again. The oldest one always goes on, hence everything ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.sequence import Sequence, SequenceStatus

WATERMARK = 0.01  # share of the blocks that admission leaves free for the growth of what runs already


@dataclass(slots=True)
class ScheduledBatch:
    """One step: `num_scheduled_tokens[i]` tokens of `sequences[i]`, from its `num_computed_tokens` on.

    A sequence draws a token in this step if all its tokens are computed after it.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

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
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. ValueError, one sentence: it could not be completed even if it were alone."""
        prompt, longest = seq.num_prompt_tokens, seq.max_num_tokens
        if prompt == 0:
            raise ValueError("a prompt needs at least one token")
        if prompt + 1 > self.max_model_len:
            raise ValueError(
                f"a prompt of {prompt:,} tokens leaves no room for a token: prompt and completion together may have "
                f"{self.max_model_len:,} (model.max_model_len)"
            )
        if self.blocks.num_blocks_for(longest - 1) > self.blocks.num_blocks:  # the last token is never computed
            capacity = self.blocks.num_blocks * self.blocks.block_size
            raise ValueError(
                f"{prompt:,} prompt tokens and up to {longest - prompt:,} new ones do not fit the KV cache of {capacity:,} tokens"
            )
        self.waiting.append(seq)

    def schedule(self) -> ScheduledBatch:
        """Choose the next step: decode rows, then chunks of what is partly prefilled, then new sequences."""
        batch = ScheduledBatch()
        partial = self._schedule_decodes(batch)
        budget = self.max_num_batched_tokens - len(batch.sequences)
        self._admit(batch, self._schedule_chunks(batch, partial, budget))
        return batch

    def _schedule_decodes(self, batch: ScheduledBatch) -> list[Sequence]:
        """Add every sequence that lacks only its last token; return the others, which are still in prefill.

        These rows alone never exceed the budget: the step that admitted the last of them had a token for each.
        """
        block_size = self.blocks.block_size
        partial = []
        for seq in list(self.running.values()):
            if seq.status is not SequenceStatus.RUNNING:  # preempted by an older one in this loop
                continue
            num_tokens = len(seq.token_ids)
            if num_tokens >= seq.max_num_tokens:  # its last token is being drawn
                continue
            if num_tokens - seq.num_computed_tokens > 1:
                partial.append(seq)
            elif num_tokens <= len(seq.block_table) * block_size or self._grow(seq, batch):
                batch.sequences.append(seq)
                batch.num_scheduled_tokens.append(1)
        return partial

    def _grow(self, seq: Sequence, batch: ScheduledBatch) -> bool:
        """Give `seq` the block its next token needs, from the youngest ones if need be. False: it was the youngest itself."""
        while not self.blocks.can_allocate(seq, seq.num_tokens):
            _, youngest = self.running.popitem()
            self._preempt(youngest)
            batch.preempted.append(youngest)
            if youngest is seq:
                return False
        self.blocks.allocate(seq, seq.num_tokens)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self.waiting.appendleft(seq)

    def _schedule_chunks(self, batch: ScheduledBatch, partial: list[Sequence], budget: int) -> int:
        for seq in partial:
            chunk = min(budget, seq.num_tokens - seq.num_computed_tokens)
            if chunk == 0:
                break
            batch.add(seq, chunk)
            budget -= chunk
        return budget

    def _admit(self, batch: ScheduledBatch, budget: int) -> None:
        """Start waiting sequences in order. One that was preempted in this step stays: somebody took a block of its own."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            reserve = self.watermark if self.running else 0
            if not self.blocks.can_allocate(seq, seq.num_tokens, reserve):
                break
            self.waiting.popleft()
            self.blocks.allocate(seq, seq.num_tokens)
            seq.status = SequenceStatus.RUNNING
            self.running[seq.request.request_id] = seq
            chunk = min(budget, seq.num_tokens)
            batch.add(seq, chunk)
            budget -= chunk

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands, and free its blocks."""
        if seq.status is SequenceStatus.WAITING:
            del self.waiting[next(i for i, other in enumerate(self.waiting) if other is seq)]
        else:
            del self.running[seq.request.request_id]
        self.blocks.free(seq)
        seq.status = SequenceStatus.FINISHED

    def check_invariants(self) -> None:
        """The pool is consistent, what waits holds nothing, what runs holds what it has computed. For tests and idle moments."""
        self.blocks.check_invariants(self.running.values())
        assert len(self.running) <= self.max_num_seqs
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING and not seq.block_table and seq.num_computed_tokens == 0
        for seq in self.running.values():
            assert seq.status is SequenceStatus.RUNNING
            assert seq.num_computed_tokens <= len(seq.block_table) * self.blocks.block_size
