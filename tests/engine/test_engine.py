"""The engine's bookkeeping is exact, whatever the batch, the chunks, the preemptions and the aborts.

The model is replaced by a cache of token ids and a hash: the next token depends on every token that the block table leads
to, so a wrong slot, position or table changes the answer.
"""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.batch import Batch
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import Request, SamplingParams, StepResult, StepStats, TokenOutput

VOCAB, EOS, MAX_MODEL_LEN = 40, 0, 40
COMMON = [7, 3, 1, 9, 4, 4, 2, 8, 30, 21, 5, 6]  # what some prompts begin with


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(np.array(tokens, dtype=np.int64).tobytes()) % VOCAB


def expected(request: Request, max_model_len: int = MAX_MODEL_LEN) -> tuple[list[int], str]:
    """The completion and its finish reason, one sequence at a time and without any engine."""
    sampling, tokens, completion = request.sampling, list(request.prompt_token_ids), []
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    while True:
        token = next_token(tokens)
        tokens.append(token)
        completion.append(token)
        if token in stops and len(completion) > sampling.min_tokens:
            return completion, "stop"
        if len(completion) == sampling.max_tokens or len(tokens) == max_model_len:
            return completion, "length"


class HashRunner:
    """A runner whose KV cache holds token ids and positions, and whose next token is a hash of the context.

    It computes late, as a device does: a launched batch is worked on when its tokens are waited for, in order.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache = np.full((num_blocks * block_size, 2), -1)
        self.last_tokens = np.full(64, -1)
        self.shared: np.ndarray | None = None
        self.launched: list[Callable[[], object]] = []
        self.num_tokens = 0
        self.closed = False

    can_retry = True

    def share(self, batch: Batch) -> None:
        self.shared = batch.pack().copy()

    def forward(self, batch: Batch) -> Batch:
        assert self.shared is not None
        np.testing.assert_array_equal(self.shared, batch.pack())
        launched = Batch.unpack(self.shared)
        self.launched.append(lambda: self.compute(launched))
        return launched

    def sample(self, batch: Batch, forward: Batch, mask: object) -> DrawnTokens:
        assert mask is None
        drawn = DrawnTokens(self)
        self.launched.append(lambda: drawn.draw(forward))
        return drawn

    def compute(self, batch: Batch) -> None:
        self.num_tokens += batch.num_tokens
        token_ids = np.where(batch.token_ids < 0, self.last_tokens[-1 - batch.token_ids], batch.token_ids)
        assert (token_ids >= 0).all() and (batch.token_ids < 0).sum() == batch.num_fed
        self.cache[batch.slot_mapping] = np.stack([token_ids, batch.positions], axis=1)

    def context(self, batch: Batch, sequence: int) -> list[int]:
        positions = np.arange(batch.context_lens[sequence])
        slots = batch.block_tables[sequence][positions // self.block_size] * self.block_size + positions % self.block_size
        np.testing.assert_array_equal(self.cache[slots, 1], positions)
        return self.cache[slots, 0].tolist()

    def close(self) -> None:
        self.closed = True


class DrawnTokens:
    def __init__(self, runner: HashRunner) -> None:
        self.runner, self.token_ids = runner, None

    def draw(self, batch: Batch) -> None:
        self.token_ids = [next_token(self.runner.context(batch, sequence)) for sequence in batch.sample_seqs]
        self.runner.last_tokens[batch.sample_slots] = self.token_ids

    def result(self) -> StepResult:
        while self.token_ids is None:
            self.runner.launched.pop(0)()
        return StepResult(self.token_ids)


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 16,
    overlap: bool = False,
    prefix_caching: bool = False,
) -> tuple[Engine, HashRunner]:
    runner = HashRunner(num_blocks, block_size)
    scheduler = Scheduler(BlockManager(num_blocks, block_size, prefix_caching), max_num_seqs, budget, MAX_MODEL_LEN)
    return Engine(runner, scheduler, frozenset({EOS}), overlap), runner


def make_request(request_id: int, rng: random.Random, **sampling: object) -> Request:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 25))]
    if rng.random() < 0.5:
        prompt = COMMON[: len(prompt) // 2] + prompt[len(prompt) // 2 :]
    chosen = {"max_tokens": rng.randint(1, 20), "min_tokens": rng.randint(0, 4), "ignore_eos": rng.random() < 0.5, **sampling}
    return Request(request_id, prompt, SamplingParams(**chosen), seed=request_id)  # type: ignore[arg-type]


class Answers:
    """Collects outputs and holds them to the promises of `TokenOutput`."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.reasons: dict[int, str] = {}
        self.stats: list[StepStats] = []

    def add(self, outputs: list[TokenOutput], stats: StepStats) -> None:
        self.stats.append(stats)
        for output in outputs:
            assert output.request_id not in self.reasons, "an answer after the end"
            assert (output.ttft_s is not None) == (output.request_id not in self.tokens)
            assert (output.latency_s is not None) == (output.finish_reason is not None)
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason

    def total(self, name: str) -> int:
        return sum(getattr(stats, name) for stats in self.stats)


def run_to_end(engine: Engine) -> Answers:
    answers = Answers()
    while engine.has_work():
        answers.add(*engine.step())
        engine.scheduler.check_invariants()
    return answers


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([10, 14, 64]),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 40),
    overlap=st.booleans(),
    prefix_caching=st.booleans(),
)
def test_answers_and_sums_are_exact(
    seed: int, num_blocks: int, max_num_seqs: int, budget: int, overlap: bool, prefix_caching: bool
) -> None:
    rng = random.Random(seed)
    engine, runner = make_engine(num_blocks, 4, max_num_seqs, budget, overlap, prefix_caching)
    requests = [make_request(i, rng) for i in range(12)]
    for request in requests:
        engine.add(request)
    answers = run_to_end(engine)
    assert {r.request_id: (answers.tokens[r.request_id], answers.reasons[r.request_id]) for r in requests} == {
        r.request_id: expected(r) for r in requests
    }
    prompts, completions = sum(len(r.prompt_token_ids) for r in requests), sum(len(t) for t in answers.tokens.values())
    hits = answers.total("prefix_hit_tokens")
    assert answers.total("prefill_tokens") + hits == prompts and (prefix_caching or hits == 0)
    assert answers.total("decode_tokens") == completions
    computed = prompts - hits + answers.total("recomputed_tokens") + completions - len(requests)
    # With overlap a sequence that stops by itself has one more step under way, which nobody reads.
    wasted = sum(reason == "stop" for reason in answers.reasons.values()) if overlap else 0
    assert computed <= runner.num_tokens <= computed + wasted
    assert prefix_caching or (answers.total("recomputed_tokens") > 0) == (answers.total("preempted") > 0)
    assert sum(len(stats.ttft_s) for stats in answers.stats) == len(requests)
    assert sum(len(stats.inter_token_s) for stats in answers.stats) == completions - len(requests)
    assert engine.scheduler.blocks.num_used_blocks == 0 and len(engine.builder.free_rows) == engine.scheduler.max_num_seqs


def test_a_tiny_pool_preempts() -> None:
    """The runs above mean little if none of them preempts."""
    rng = random.Random(0)
    engine, _ = make_engine(num_blocks=10, budget=40)
    for i in range(12):
        engine.add(make_request(i, rng, ignore_eos=True, max_tokens=15))
    answers = run_to_end(engine)
    assert answers.total("preempted") > 3 and answers.total("recomputed_tokens") > 50


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.sampled_from([10, 20]), overlap=st.booleans(), prefix_caching=st.booleans())
def test_requests_may_come_and_go_at_any_moment(seed: int, num_blocks: int, overlap: bool, prefix_caching: bool) -> None:
    rng = random.Random(seed)
    engine, _ = make_engine(num_blocks, 4, max_num_seqs=5, budget=12, overlap=overlap, prefix_caching=prefix_caching)
    requests = {i: make_request(i, rng) for i in range(20)}
    to_come, aborted, answers = list(requests), set(), Answers()
    while to_come or engine.has_work():
        for _ in range(min(len(to_come), rng.choice([0, 1, 4]))):
            engine.add(requests[to_come.pop()])
        if rng.random() < 0.3:
            victim = rng.randrange(20)  # waiting, running, ended, or not yet there
            aborted |= {victim} & set(engine.sequences)
            engine.abort(victim)
            assert victim not in engine.sequences
        engine.scheduler.check_invariants()
        if engine.has_work():
            answers.add(*engine.step())
    assert set(answers.reasons) == set(requests) - aborted
    for i, tokens in answers.tokens.items():
        reference, reason = expected(requests[i])
        assert tokens == reference[: len(tokens)]
        assert i in aborted or (tokens, answers.reasons[i]) == (reference, reason)
    assert engine.scheduler.blocks.num_used_blocks == 0


def complete(prompt: list[int], **sampling: object) -> tuple[list[int], str]:
    engine, _ = make_engine()
    engine.add(Request(5, prompt, SamplingParams(**sampling), seed=0))  # type: ignore[arg-type]
    answers = run_to_end(engine)
    return answers.tokens[5], answers.reasons[5]


def free_run(prompt: list[int]) -> list[int]:
    return complete(prompt, max_tokens=100, ignore_eos=True)[0]


def prompt_that_reaches_eos() -> list[int]:
    return next(p for p in ([i, 1, 2] for i in range(VOCAB)) if EOS in free_run(p)[1:10])


def test_max_model_len_ends_a_completion() -> None:
    tokens, reason = complete([1, 2, 3], max_tokens=100, ignore_eos=True)
    assert (len(tokens), reason) == (MAX_MODEL_LEN - 3, "length")


def test_end_of_sequence_ends_and_is_counted() -> None:
    prompt = prompt_that_reaches_eos()
    tokens = free_run(prompt)
    end = tokens.index(EOS) + 1
    assert complete(prompt, max_tokens=100) == (tokens[:end], "stop")
    assert complete(prompt, max_tokens=end) == (tokens[:end], "stop")
    assert complete(prompt, max_tokens=end - 1) == (tokens[: end - 1], "length")


def test_stop_token_ids_and_min_tokens() -> None:
    tokens = free_run([3, 1, 4])
    first = tokens.index(tokens[4]) + 1
    assert complete([3, 1, 4], max_tokens=100, ignore_eos=True, stop_token_ids=(tokens[4],)) == (tokens[:first], "stop")
    after = complete([3, 1, 4], max_tokens=first + 3, ignore_eos=True, stop_token_ids=(tokens[4],), min_tokens=first)
    assert len(after[0]) > first


def test_what_cannot_be_completed_is_a_sentence_and_leaves_no_trace() -> None:
    engine, _ = make_engine()
    for prompt in ([], [1] * MAX_MODEL_LEN):
        with pytest.raises(ValueError, match="token"):
            engine.add(Request(1, prompt, SamplingParams(), seed=0))
    engine.add(Request(1, [1], SamplingParams(), seed=0))
    with pytest.raises(ValueError, match="already"):
        engine.add(Request(1, [2], SamplingParams(), seed=0))
    assert (engine.num_waiting, engine.num_running) == (1, 0)


def test_step_statistics_of_a_small_run() -> None:
    engine, runner = make_engine(num_blocks=20, budget=8)
    for i, prompt in enumerate(([1] * 5, [2] * 6)):
        engine.add(Request(i, prompt, SamplingParams(max_tokens=3, ignore_eos=True), seed=0))
    stats = run_to_end(engine).stats
    names = ("step", "prefill_seqs", "decode_seqs", "prefill_tokens", "decode_tokens", "running", "waiting", "kv_blocks_used")
    assert [tuple(getattr(s, name) for name in names) for s in stats] == [
        (0, 2, 0, 8, 1, 2, 0, 4),
        (1, 1, 1, 3, 2, 2, 0, 4),
        (2, 0, 2, 0, 2, 2, 0, 4),
        (3, 0, 1, 0, 1, 1, 0, 2),
    ]
    assert all(s.kv_blocks_total == 20 and s.duration_s > 0 for s in stats)
    engine.close()
    assert runner.closed
