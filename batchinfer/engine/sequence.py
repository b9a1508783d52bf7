"""What the engine is asked and what it answers: plain values, no torch, no Parquet.

A `Request` goes in by `Engine.add`, is scheduled as a `Sequence`, and comes back as `TokenOutput`s. `StepResult` is what the
device answers to one step, `StepStats` is that step in numbers.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

NO_TOKEN = -1  # in a step's result: the model's numbers overflowed, and nothing was drawn
PENDING = -1  # stands in a sequence's tokens for one that the device draws and the host has not read yet


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen. `temperature` 0 is greedy. Stop *strings* are the pipeline's business.

    `logprobs` and `prompt_logprobs`: None, or of how many of the likeliest tokens to tell the log-probability, beside the
    token that stands there.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a completion must look like: a matcher in its start state, which requests share and nobody advances."""

    matcher: LLMatcher
    vocab_size: int  # of the model


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to complete. `seed` (64 bit, unsigned) alone decides its random draws.

    `completion_token_ids`: the completion as far as another engine had come with the same request. It goes on from there, by
    prefill; limits and penalties count these tokens, outputs bring only what follows, and nothing is told of the prompt again.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int
    grammar: Grammar | None = None
    completion_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of a token, given those before it: natural logarithms of probabilities.

    They are the model's own, before penalties, masks, temperature and filters. `rank` 1 is the likeliest token.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]  # the likeliest tokens and theirs, as many as were asked for


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True)
class Sequence:
    """A request while the engine works on it.

    `token_ids` is the prompt followed by the generated tokens, of which the last may be PENDING. `num_computed_tokens` of
    them have their keys and values in the blocks of `block_table`, or will when the steps launched so far have run;
    preemption sets it back to 0 and keeps the tokens.
    """

    request: Request
    token_ids: list[int]
    num_prompt_tokens: int
    max_num_tokens: int  # prompt and completion together; with so many there is nothing left to compute
    status: SequenceStatus = SequenceStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_blocks: int = 0  # leading blocks of `block_table` that the prefix cache knows
    num_preemptions: int = 0
    num_prefilled_tokens: int = 0  # high-water mark: what lies below it is recomputed, after a preemption or in another engine
    admitted_s: float = 0.0  # monotonic clock, when Engine.add was called
    last_token_s: float | None = None  # None: this engine has drawn none
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of its tokens from the second on, until they are told
    matcher: LLMatcher | None = None  # has consumed every known token of the completion

    @classmethod
    def from_request(cls, request: Request, now: float, max_model_len: int) -> Sequence:
        prompt = request.prompt_token_ids
        longest = min(len(prompt) + request.sampling.max_tokens, max_model_len)
        matcher = None if request.grammar is None else request.grammar.matcher.deep_copy()
        seq = cls(request, list(prompt), len(prompt), longest, admitted_s=now, matcher=matcher)
        if request.completion_token_ids:
            seq._go_on(request.completion_token_ids)
        return seq

    def _go_on(self, completion: list[int]) -> None:
        """Stand as after a preemption. A matcher that refuses a token fails with the next mask (`engine.grammar`)."""
        self.token_ids += completion
        self.num_prefilled_tokens = len(self.token_ids)
        if self.matcher is not None:
            self.matcher.consume_tokens(completion)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True)  # not frozen: that costs four times as much to make, for every row of every step
class TokenOutput:
    """New tokens of one sequence after a step. `finish_reason`: None while it goes on, else `stop`, `length` or `error`.

    The token that stopped it (an end-of-sequence or stop token id) is the last of `token_ids` and is counted. Log-probabilities
    are None where they were not asked for. `error`: the code and the sentence of what broke it off: `bad_grammar`, its grammar
    cannot be followed to the end (in llguidance's words), or `bad_logits`, the model's numbers overflowed (no token).
    """

    request_id: int
    token_ids: list[int]
    finish_reason: str | None
    ttft_s: float | None  # set with the completion's first token: seconds since admission
    latency_s: float | None  # set when finished: seconds since admission
    logprobs: list[TokenLogprobs] | None = None  # of each of `token_ids`
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token; nothing precedes the prompt's first: None
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew, on the host: a token for each sequence that draws one, in batch order."""

    token_ids: list[int]  # or NO_TOKEN
    logprobs: list[TokenLogprobs | None] | None = None  # None: nobody asked
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the batch's prompt positions, in order
    graph: bool = False  # whether the step was the replay of a captured one


@dataclass(slots=True)
class StepStats:
    """One engine step in numbers. Latencies are lists of seconds, reduced to percentiles where they are recorded."""

    step: int
    started: float  # seconds since the Unix epoch
    duration_s: float = 0.0
    prefill_seqs: int = 0
    decode_seqs: int = 0
    prefill_tokens: int = 0  # prompt tokens computed for the first time
    prefix_hit_tokens: int = 0  # prompt tokens that were found computed: with prefill_tokens they make the prompts
    recomputed_tokens: int = 0  # tokens computed again after a preemption, or because another engine had computed them
    decode_tokens: int = 0  # completion tokens that came out of this step
    running: int = 0
    waiting: int = 0
    preempted: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    graph: bool = False
    ttft_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)
