"""The engine: a queue of sequences, and a step that moves all of them on.

`Engine.step` is the spine: schedule, build, share, launch, collect. With overlap the next step is launched before the tokens of
this one are read, so that the device never waits for the host: a token that is drawn but not read stands as PENDING in its
sequence, and is fed to the next step on the device. Without overlap each step is read at once; both draw the same tokens.

Rank 0 runs the engine; the other ranks of a tensor-parallel group follow in `serve`. The engine knows neither files nor text:
requests and answers are token ids.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch

from batchinfer.config import Config
from batchinfer.engine.batch import Batch, BatchBuilder, prompt_positions
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.grammar import GrammarMasks, follow
from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.sampler import TokenMask
from batchinfer.engine.scheduler import ScheduledBatch, Scheduler
from batchinfer.engine.sequence import (
    NO_TOKEN,
    PENDING,
    Request,
    Sequence,
    SequenceStatus,
    StepResult,
    StepStats,
    TokenLogprobs,
    TokenOutput,
)
from batchinfer.job.vitals import Phase, Pulse
from batchinfer.model.config import ModelShape
from batchinfer.model.parallel import TensorParallel

logger = logging.getLogger(__name__)


class Drawn(Protocol):
    """Tokens that are being drawn."""

    def result(self) -> StepResult:
        """Wait for them."""


class Runner(Protocol):
    """What the engine needs of the model: `ModelRunner`, or a stand-in for tests."""

    can_retry: bool  # whether a `forward` that ran out of memory may be followed by another one

    def share(self, batch: Batch) -> None:
        """Give the other ranks the batch that this one is about to compute."""

    def forward(self, batch: Batch) -> Any:
        """Launch the forward pass."""

    def sample(self, batch: Batch, forward: Any, mask: TokenMask | None) -> Drawn:
        """Launch the drawing of a token for each sequence that draws one. `mask`: what grammars allow."""

    def close(self) -> None:
        """Let the other ranks go."""


@dataclass(slots=True)
class Step:
    """A launched step, and where what comes out of it belongs."""

    batch: Batch
    forward: Any  # the runner's handle
    stats: StepStats
    places: list[tuple[Sequence, int]] = field(default_factory=list)  # who draws a token, and where among its tokens
    structured: list[tuple[int, Sequence]] = field(default_factory=list)  # which of them have a grammar
    prompt_places: list[tuple[Sequence, int]] = field(default_factory=list)  # whose prompt's log-probabilities, how many
    drawn: Drawn | None = None


class Engine:
    """`add` requests, `step` until `has_work` is false; `abort` takes a request out between two steps."""

    def __init__(self, runner: Runner, scheduler: Scheduler, eos_token_ids: frozenset[int], overlap: bool = False) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.eos_token_ids = eos_token_ids
        self.overlap = overlap
        self.max_model_len = scheduler.max_model_len
        blocks = scheduler.blocks
        max_blocks = blocks.num_blocks_for(self.max_model_len)
        self.builder = BatchBuilder(scheduler.max_num_seqs, max_blocks, blocks.block_size, eos_token_ids)
        self.masks = GrammarMasks(eos_token_ids)
        self.sequences: dict[int, Sequence] = {}
        self.in_flight: Step | None = None  # launched by the step before
        self.num_steps = 0
        self.num_preempted = 0  # not yet in a step's statistics
        self.phases: dict[str, float] = {}  # seconds that each part of the start took

    def add(self, request: Request) -> None:
        """Queue a request. ValueError: its id is in use, or it could never be completed (one sentence for the row's error)."""
        if request.request_id in self.sequences:
            raise ValueError(f"request {request.request_id} is already in the engine")
        seq = Sequence.from_request(request, time.monotonic(), self.max_model_len)
        self.scheduler.add(seq)
        self.sequences[request.request_id] = seq

    def abort(self, request_id: int) -> None:
        """Take a request out and free what it holds. One that has ended already is left alone.

        A step in flight may still compute it: the device writes to its blocks before it does anything for their next owner.
        """
        if request_id in self.sequences:
            self._finish(self.sequences[request_id])

    def has_work(self) -> bool:
        return self.in_flight is not None or self.scheduler.has_work()

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    def step(self, last: bool = False) -> tuple[list[TokenOutput], StepStats]:
        """Move on every sequence that there is room for. Call it only while `has_work`.

        `last`: nothing is launched ahead, so that no token is drawn which nobody reads.
        """
        begin = time.monotonic()
        step = self.in_flight or self._draw(self._launch())
        assert step is not None and step.drawn is not None, "step() without work"
        following = self._launch() if self.overlap and not last else None
        result = step.drawn.result()
        step.stats.graph = result.graph
        outputs = self._collect(step, result)
        self.in_flight = self._draw(following)
        step.stats.duration_s = time.monotonic() - begin
        if not self.has_work():
            self.scheduler.check_invariants()
        return outputs, step.stats

    def close(self) -> None:
        """End the other ranks' `serve`."""
        self.runner.close()

    def _launch(self) -> Step | None:
        """Schedule a step and launch its forward pass. None: whatever runs only waits for tokens that are being drawn."""
        while (scheduled := self._schedule()).sequences:
            batch = self.builder.build(scheduled)
            self.runner.share(batch)
            try:
                forward = self.runner.forward(batch)
            except torch.OutOfMemoryError:
                if scheduled.num_tokens == 1 or not self.runner.can_retry:
                    raise
            else:
                return self._launched(scheduled, batch, forward)
            self._shrink(scheduled)  # out here no traceback holds the step's tensors any more
        return None

    def _launched(self, scheduled: ScheduledBatch, batch: Batch, forward: Any) -> Step:
        step = Step(batch, forward, self._describe(scheduled))
        for seq, count in zip(scheduled.sequences, scheduled.num_scheduled_tokens, strict=True):
            self._advance(seq, count, step)
        return step

    def _schedule(self) -> ScheduledBatch:
        scheduled = self.scheduler.schedule()
        self._release(scheduled.preempted)
        return scheduled

    def _release(self, preempted: list[Sequence]) -> None:
        self.num_preempted += len(preempted)
        for seq in preempted:
            self.builder.release(seq)

    def _shrink(self, scheduled: ScheduledBatch) -> None:
        """Go on with smaller steps after one that was out of memory.

        Nothing of the step has happened as far as anybody knows: what it stored in the cache is stored again.
        """
        self._release(self.scheduler.shrink(scheduled))
        torch.cuda.empty_cache()
        logger.warning(
            "a step of %s tokens was out of memory: from here on a step has at most %s",
            f"{scheduled.num_tokens:,}",
            f"{self.scheduler.max_num_batched_tokens:,}",
        )

    def _advance(self, seq: Sequence, count: int, step: Step) -> None:
        """Count what is launched as computed, and hold the places of what will come out."""
        if seq.request.sampling.prompt_logprobs is not None:
            step.prompt_places.append((seq, len(prompt_positions(seq, count))))
        seq.num_computed_tokens += count
        if seq.num_computed_tokens > seq.num_prefilled_tokens:
            seq.num_prefilled_tokens = seq.num_computed_tokens
        if seq.num_computed_tokens == len(seq.token_ids):
            if seq.matcher is not None:
                step.structured.append((len(step.places), seq))
            step.places.append((seq, len(seq.token_ids)))
            seq.token_ids.append(PENDING)

    def _draw(self, step: Step | None) -> Step | None:
        """Launch the drawing of a step's tokens. All that were drawn before are known by now."""
        if step is not None:
            mask = self.masks.fill(step.structured) if step.structured else None
            step.drawn = self.runner.sample(step.batch, step.forward, mask)
        return step

    def _describe(self, scheduled: ScheduledBatch) -> StepStats:
        """What the step is about to do, in numbers; before `_advance` moves the marks that they are counted from."""
        stats = StepStats(self.num_steps, time.time())
        self.num_steps += 1
        for seq, count in zip(scheduled.sequences, scheduled.num_scheduled_tokens, strict=True):
            start, known = seq.num_computed_tokens, seq.num_prefilled_tokens
            if start >= max(known, seq.num_prompt_tokens):
                continue
            stats.prefill_seqs += 1
            stats.recomputed_tokens += max(0, min(start + count, known) - start)
            stats.prefill_tokens += max(0, min(start + count, seq.num_prompt_tokens) - max(start, known))
        stats.prefix_hit_tokens = scheduled.prefix_hit_tokens
        stats.decode_seqs = len(scheduled.sequences) - stats.prefill_seqs
        stats.running, stats.waiting = self.num_running, self.num_waiting
        stats.preempted, self.num_preempted = self.num_preempted, 0
        stats.kv_blocks_used = self.scheduler.blocks.num_used_blocks
        stats.kv_blocks_total = self.scheduler.blocks.num_blocks
        return stats

    def _collect(self, step: Step, result: StepResult) -> list[TokenOutput]:
        """Put drawn tokens into their places, and take out what has ended."""
        told = iter(result.prompt_logprobs)
        for seq, count in step.prompt_places:
            seq.prompt_logprobs += islice(told, count)
        outputs = []
        now = time.monotonic()
        logprobs = result.logprobs or [None] * len(result.token_ids)
        for (seq, index), token_id, logprob in zip(step.places, result.token_ids, logprobs, strict=True):
            if seq.status is not SequenceStatus.FINISHED:  # it may have ended, or been aborted, since the launch
                outputs.append(self._append(seq, index, token_id, logprob, step.stats, now))
        step.stats.decode_tokens = sum(len(output.token_ids) for output in outputs)
        return outputs

    def _append(
        self, seq: Sequence, index: int, token_id: int, logprob: TokenLogprobs | None, stats: StepStats, now: float
    ) -> TokenOutput:
        """Token number `index` of a sequence, prompt included, is known."""
        ttft = latency = prompt_logprobs = None
        if index == seq.num_prompt_tokens:
            ttft = now - seq.admitted_s
            stats.ttft_s.append(ttft)
            if seq.request.sampling.prompt_logprobs is not None:
                prompt_logprobs, seq.prompt_logprobs = [None, *seq.prompt_logprobs], []
        elif seq.last_token_s is not None:
            stats.inter_token_s.append(now - seq.last_token_s)
        seq.last_token_s = now
        seq.token_ids[index] = token_id
        error = _error(seq, token_id)
        finish_reason = self._finish_reason(seq, index, token_id) if error is None else "error"
        if finish_reason is not None:
            latency = now - seq.admitted_s
            self._finish(seq)
        drawn = [] if token_id == NO_TOKEN else [token_id]
        logprobs = None if logprob is None else [logprob][: len(drawn)]
        return TokenOutput(seq.request.request_id, drawn, finish_reason, ttft, latency, logprobs, prompt_logprobs, error)

    def _finish_reason(self, seq: Sequence, index: int, token_id: int) -> str | None:
        sampling = seq.request.sampling
        if seq.matcher is not None and token_id in self.eos_token_ids:  # it was allowed because the text may end, or must
            return "stop"
        if index + 1 - seq.num_prompt_tokens > sampling.min_tokens:
            if token_id in self.eos_token_ids and not sampling.ignore_eos:
                return "stop"
            if token_id in sampling.stop_token_ids:
                return "stop"
        return "length" if index + 1 >= seq.max_num_tokens else None

    def _finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.builder.release(seq)
        del self.sequences[seq.request.request_id]


def _error(seq: Sequence, token_id: int) -> tuple[str, str] | None:
    """What `TokenOutput.error` says of a sequence whose next token this is."""
    if token_id == NO_TOKEN:
        return "bad_logits", "the model's logits are not numbers: something overflowed; try model.dtype=bfloat16 or float32"
    unfit = None if seq.matcher is None else follow(seq.matcher, token_id)
    return None if unfit is None else ("bad_grammar", unfit)


def build_engine(config: Config, shape: ModelShape, parallel: TensorParallel, device: torch.device) -> Engine:
    """Rank 0's engine, ready to step. The other ranks call `serve(build_runner(...))` with the same arguments."""
    runner = build_runner(config, shape, parallel, device)
    blocks = BlockManager(runner.num_blocks, config.engine.block_size, config.engine.prefix_caching)
    scheduler = Scheduler(blocks, config.engine.max_num_seqs, config.engine.max_num_batched_tokens, runner.max_model_len)
    engine = Engine(runner, scheduler, frozenset(shape.eos_token_ids), config.engine.overlap)
    engine.phases = runner.phases
    return engine


def serve(runner: ModelRunner, pulse: Pulse | None = None) -> None:
    """Compute what rank 0 computes, in lockstep, until it closes its engine. `pulse` beats before and after each step."""
    beat = pulse.beat if pulse is not None else lambda phase, step=None: None
    step = 0
    beat(Phase.FOLLOWING)
    while (batch := runner.receive()) is not None:
        step += 1
        beat(Phase.STEPPING, step)
        runner.follow(batch)
        beat(Phase.FOLLOWING)
    beat(Phase.ENDING)
