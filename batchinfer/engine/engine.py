"""The engine: a queue of sequences, and a step that moves all of them on.

`Engine.step` is the spine: schedule, build, share, execute, update. Rank 0 runs it; the other ranks of a tensor-parallel
group follow in `serve`. The engine knows neither files nor text: requests and answers are token ids.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch

from batchinfer.config import Config
from batchinfer.engine.batch import Batch, BatchBuilder
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.scheduler import ScheduledBatch, Scheduler
from batchinfer.engine.sequence import Request, Sequence, StepStats, TokenOutput
from batchinfer.model.config import ModelShape
from batchinfer.model.parallel import TensorParallel


class Runner(Protocol):
    """What the engine needs of the model: `ModelRunner`, or a stand-in for tests."""

    def share(self, batch: Batch) -> None:
        """Give the other ranks the batch that this one is about to execute."""

    def execute(self, batch: Batch) -> list[int]:
        """Compute the batch; the drawn token of each sequence that draws one, in order."""

    def close(self) -> None:
        """Let the other ranks go."""


class Engine:
    """`add` requests, `step` until `has_work` is false; `abort` takes a request out between two steps."""

    def __init__(self, runner: Runner, scheduler: Scheduler, eos_token_ids: frozenset[int]) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.eos_token_ids = eos_token_ids
        self.max_model_len = scheduler.max_model_len
        blocks = scheduler.blocks
        max_blocks = blocks.num_blocks_for(self.max_model_len)
        self.builder = BatchBuilder(scheduler.max_num_seqs, max_blocks, blocks.block_size, eos_token_ids)
        self.sequences: dict[int, Sequence] = {}
        self.num_steps = 0
        self.phases: dict[str, float] = {}  # seconds that each part of the start took

    def add(self, request: Request) -> None:
        """Queue a request. ValueError: its id is in use, or it could never be completed (one sentence for the row's error)."""
        if request.request_id in self.sequences:
            raise ValueError(f"request {request.request_id} is already in the engine")
        seq = Sequence.from_request(request, time.monotonic())
        self.scheduler.add(seq)
        self.sequences[request.request_id] = seq

    def abort(self, request_id: int) -> None:
        """Take a request out and free what it holds. One that has ended already is left alone."""
        if request_id in self.sequences:
            self._finish(self.sequences[request_id])

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    def step(self) -> tuple[list[TokenOutput], StepStats]:
        """Move on every sequence that there is room for. Call it only while `has_work`."""
        begin = time.monotonic()
        stats = StepStats(self.num_steps, time.time())
        scheduled = self.scheduler.schedule()
        batch = self._build(scheduled)
        self.runner.share(batch)
        self._describe(scheduled, stats)
        outputs = self._update(scheduled, self.runner.execute(batch), stats)
        stats.duration_s = time.monotonic() - begin
        self.num_steps += 1
        if not self.has_work():
            self.scheduler.check_invariants()
        return outputs, stats

    def close(self) -> None:
        """End the other ranks' `serve`."""
        self.runner.close()

    def _build(self, scheduled: ScheduledBatch) -> Batch:
        for seq in scheduled.preempted:
            self.builder.release(seq)
        return self.builder.build(scheduled)

    def _describe(self, scheduled: ScheduledBatch, stats: StepStats) -> None:
        """What the step is about to do, in numbers; before `_update` moves the marks that they are counted from."""
        for seq, count in zip(scheduled.sequences, scheduled.num_scheduled_tokens, strict=True):
            start, known = seq.num_computed_tokens, seq.num_prefilled_tokens
            if start >= max(known, seq.num_prompt_tokens):
                continue
            stats.prefill_seqs += 1
            stats.recomputed_tokens += max(0, min(start + count, known) - start)
            stats.prefill_tokens += max(0, min(start + count, seq.num_prompt_tokens) - max(start, known))
        stats.decode_seqs = len(scheduled.sequences) - stats.prefill_seqs
        stats.running, stats.waiting = self.num_running, self.num_waiting
        stats.preempted = len(scheduled.preempted)
        stats.kv_blocks_used = self.scheduler.blocks.num_used_blocks
        stats.kv_blocks_total = self.scheduler.blocks.num_blocks

    def _update(self, scheduled: ScheduledBatch, sampled: list[int], stats: StepStats) -> list[TokenOutput]:
        """Record what was computed, append the drawn tokens, and take out what has ended."""
        outputs = []
        tokens, now = iter(sampled), time.monotonic()
        for seq, count in zip(scheduled.sequences, scheduled.num_scheduled_tokens, strict=True):
            seq.num_computed_tokens += count
            if seq.num_computed_tokens > seq.num_prefilled_tokens:
                seq.num_prefilled_tokens = seq.num_computed_tokens
            if seq.num_computed_tokens == len(seq.token_ids):
                outputs.append(self._append(seq, next(tokens), stats, now))
        stats.decode_tokens = len(outputs)
        return outputs

    def _append(self, seq: Sequence, token_id: int, stats: StepStats, now: float) -> TokenOutput:
        ttft = latency = None
        if seq.num_completion_tokens == 0:
            seq.first_token_s = now
            ttft = now - seq.admitted_s
            stats.ttft_s.append(ttft)
        else:
            stats.inter_token_s.append(now - seq.last_token_s)
        seq.last_token_s = now
        seq.token_ids.append(token_id)
        finish_reason = self._finish_reason(seq, token_id)
        if finish_reason is not None:
            latency = now - seq.admitted_s
            self._finish(seq)
        return TokenOutput(seq.request.request_id, [token_id], finish_reason, ttft, latency)

    def _finish_reason(self, seq: Sequence, token_id: int) -> str | None:
        sampling = seq.request.sampling
        produced = len(seq.token_ids) - seq.num_prompt_tokens
        if produced > sampling.min_tokens:
            if token_id in self.eos_token_ids and not sampling.ignore_eos:
                return "stop"
            if token_id in sampling.stop_token_ids:
                return "stop"
        if produced >= sampling.max_tokens or len(seq.token_ids) >= self.max_model_len:
            return "length"
        return None

    def _finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.builder.release(seq)
        del self.sequences[seq.request.request_id]


def build_engine(config: Config, shape: ModelShape, parallel: TensorParallel, device: torch.device) -> Engine:
    """Rank 0's engine, ready to step. The other ranks call `serve(build_runner(...))` with the same arguments."""
    runner = build_runner(config, shape, parallel, device)
    blocks = BlockManager(runner.num_blocks, config.engine.block_size)
    scheduler = Scheduler(blocks, config.engine.max_num_seqs, config.engine.max_num_batched_tokens, runner.max_model_len)
    engine = Engine(runner, scheduler, frozenset(shape.eos_token_ids))
    engine.phases = runner.phases
    return engine


def serve(runner: ModelRunner) -> None:
    """Execute what rank 0 executes, in lockstep, until it closes its engine."""
    while (batch := runner.receive()) is not None:
        runner.execute(batch)
