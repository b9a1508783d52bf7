"""What a batch of rows asks of a device, step by step: a simulation of continuous batching in lengths alone. No torch.

Every step packs waiting prompts beside the running rows up to a number of tokens. What a step costs is for others to say: the
floor of a bench (`bench.floor`) and the prediction of a run (`prediction`) price the same steps, one at what a device was
measured to reach, the other at what the engine is expected to make of it. A GEMM takes its operations or its weights read once,
whichever is longer (Williams et al., "Roofline", 2009). Attention reads each row's own keys and values once a step, and what all
rows have in common once for all of them (Juravsky et al., "Hydragen", 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchinfer.model.config import DTYPE_BYTES, ModelShape

WATERMARK = 0.01  # share of the cache that the engine's admission leaves free for what runs already
Table = tuple[tuple[int, float], ...]
Lengths = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Ceilings:
    """What one device reaches. Rates are per second, of one rank's work."""

    read: float  # bytes, streaming
    copy: float  # bytes read and written
    gemm: Table  # (rows, operations) over the model's own layer shapes, by rows
    attention: float  # operations of causal prefill attention
    all_reduce: Table = ()  # (bytes, seconds of one), by bytes; empty: a single rank

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Ceilings:
        tables = {name: tuple((int(at), float(value)) for at, value in raw[name]) for name in ("gemm", "all_reduce")}
        return cls(raw["read"], raw["copy"], tables["gemm"], raw["attention"], tables["all_reduce"])

    @property
    def best_gemm(self) -> float:
        return max(rate for _, rate in self.gemm)

    def gemm_at(self, rows: int) -> float:
        """Operations per second with so many rows."""
        return on_line(self.gemm, rows)

    def all_reduce_seconds(self, num_bytes: int) -> float:
        """Beyond the largest that was measured it takes as long as its bytes do."""
        if not self.all_reduce:
            return 0.0
        largest, seconds = self.all_reduce[-1]
        if num_bytes > largest:
            return seconds * num_bytes / largest
        return on_line(self.all_reduce, num_bytes)


def on_line(table: tuple[tuple[float, float], ...], at: float) -> float:
    """Between two entries on a line, outside of the table as at its nearest."""
    places, values = zip(*table, strict=True)
    return float(np.interp(at, places, values))


@dataclass(frozen=True)
class Cost:
    """What one token costs one rank: parameters to multiply with, bytes to read, operations to do."""

    layer_params: float  # of all layers' GEMMs
    head_params: float
    param_bytes: int
    kv_bytes: int  # of one token over all layers
    attention_ops: float  # of one query with one key, over all layers
    hidden_bytes: int  # of one token's hidden state: what an all-reduce moves
    all_reduces: int  # of a step
    window: int | None = None  # keys that a windowed layer sees
    windowed_share: float = 0.0  # of the layers

    @classmethod
    def of(cls, shape: ModelShape, dtype: str, tensor_parallel: int = 1) -> Cost:
        local, size = shape.local_sizes(tensor_parallel), DTYPE_BYTES[dtype]
        attention = shape.hidden_size * shape.head_dim * 2 * (local.num_heads + local.num_kv_heads)
        windowed = sum(shape.window_of(layer) is not None for layer in range(shape.num_layers))
        return cls(
            layer_params=shape.num_layers * (attention + 3 * shape.hidden_size * local.intermediate_size),
            head_params=local.vocab_size * shape.hidden_size,
            param_bytes=size,
            kv_bytes=shape.kv_bytes_per_token(dtype, tensor_parallel),
            attention_ops=4 * local.num_heads * shape.head_dim * shape.num_layers,
            hidden_bytes=shape.hidden_size * size,
            all_reduces=2 * shape.num_layers if tensor_parallel > 1 else 0,
            window=shape.sliding_window,
            windowed_share=windowed / shape.num_layers,
        )

    def gemm_ops(self, tokens: int, outputs: int) -> float:
        return 2 * (self.layer_params * tokens + self.head_params * outputs)

    def weight_bytes(self, outputs: int) -> float:
        return self.param_bytes * (self.layer_params + (self.head_params if outputs else 0))

    def keys_seen(self, context: Lengths) -> Lengths:
        """Of so many tokens, how many a row reads in the mean of the layers."""
        if self.window is None:
            return context
        return (1 - self.windowed_share) * context + self.windowed_share * np.minimum(context, self.window)

    def prefill_ops(self, tokens: int, before: int) -> float:
        """Of attention, for `tokens` new ones behind `before` old ones."""
        return self.attention_ops * float(self.keys_seen(np.arange(before + 1, before + tokens + 1)).sum())


@dataclass(frozen=True)
class Work:
    """A workload as lengths: what all prompts begin with, what each has beyond that, and how much each generates."""

    prefix: int
    prompts: tuple[int, ...]
    completions: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[list[int]], completions: Iterable[int]) -> Work:
        """Of prompts as token ids."""
        prefix = common_prefix(prompts) if len(prompts) > 1 else 0
        return cls(prefix, tuple(len(prompt) - prefix for prompt in prompts), tuple(completions))


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all begin with; at least one of each stays its own."""
    first, last = min(prompts), max(prompts)  # between these in order lie all others, and share what they share
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


@dataclass(frozen=True)
class Limits:
    """What bounds a step. `expected`: a row is admitted when its prompt and this share of its completion fit the cache, the rest
    runs while others end; None is the engine's way: what is known fits, and the youngest row gives way when the cache is full."""

    kv_tokens: int
    step_tokens: int
    max_seqs: int | None = None
    expected: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step, or `repeats` of the same rows, each a token longer than the last: figures are then of the mean one."""

    repeats: int
    running: int  # rows that decode
    tokens: int  # that go through the GEMMs
    outputs: int  # of them those of which a token is drawn
    keys: float  # that are read, in the mean of the layers
    prefill_ops: float  # of attention, for prompts


class _Rows:
    """Rows that wait and that run in order of their admission, and the tokens that they hold in the cache."""

    def __init__(self, work: Work, limits: Limits) -> None:
        self.waiting = deque(zip(work.prompts, work.completions, strict=True))
        self.limits, self.used = limits, work.prefix
        self.context = np.zeros(0, dtype=np.int64)  # of each running row, without the common prefix
        self.left = np.zeros(0, dtype=np.int64)  # tokens that it will still draw

    def admit(self, room: int) -> list[int]:
        """Prompts that begin now: as long as there is room in the step and in the cache. One always may when nothing runs."""
        admitted: list[tuple[int, int]] = []
        seats = len(self.waiting) if self.limits.max_seqs is None else self.limits.max_seqs - len(self.context)
        while self.waiting and room > 0 and len(admitted) < seats:
            prompt, completion = self.waiting[0]
            is_alone = not admitted and not len(self.context)
            if not is_alone and not self._fits(prompt, completion):
                break
            admitted.append(self.waiting.popleft())
            self.used, room = self.used + prompt, room - prompt
        if admitted:
            prompts, completions = zip(*admitted, strict=True)
            self.context, self.left = np.append(self.context, prompts), np.append(self.left, completions)
        return [prompt for prompt, _ in admitted]

    def _fits(self, prompt: int, completion: int) -> bool:
        if self.limits.expected is not None:
            return self.used + prompt + self.limits.expected * completion <= self.limits.kv_tokens
        return self.used + prompt <= (1 - WATERMARK) * self.limits.kv_tokens

    def preempt(self) -> bool:
        """The engine's way with a full cache: the youngest rows wait again, with all that they have so far as their prompt."""
        if self.limits.expected is not None:
            return False
        before = len(self.context)
        while len(self.context) > 1 and self.used + len(self.context) > self.limits.kv_tokens:
            context, left = int(self.context[-1]), int(self.left[-1])
            self.waiting.appendleft((context, left))
            self.context, self.left, self.used = self.context[:-1], self.left[:-1], self.used - context
        return len(self.context) < before

    def steps_alike(self, cost: Cost, prefix: int) -> int:
        """Steps until a row ends, the cache is full, or a window leaves something behind: until then nobody can be admitted
        who cannot be now, and each step reads as many keys more than the last as there are rows."""
        room = (self.limits.kv_tokens - self.used) // len(self.context) if self.limits.expected is None else self.left[0]
        bounds = [int(self.left.min()), max(1, int(room))]
        if cost.window is not None:
            edges = cost.window - np.concatenate([self.context, self.context + prefix])
            bounds += [int(edges[edges > 0].min())] if (edges > 0).any() else []
        return min(bounds)

    def draw(self, count: int) -> None:
        """Every row gets so many tokens; those that have all of theirs go."""
        self.context, self.left = self.context + count, self.left - count
        ended = self.left == 0
        self.used += count * len(self.context) - int(self.context[ended].sum())
        if ended.any():
            self.context, self.left = self.context[~ended], self.left[~ended]


def simulate(work: Work, cost: Cost, limits: Limits) -> Iterator[Step]:
    """The steps that `work` takes. Steps that differ only in the rows' lengths come as one."""
    rows, prefix_done = _Rows(work, limits), 0
    while rows.waiting or len(rows.context):
        preempted = rows.preempt()
        running, context = len(rows.context), rows.context
        chunk = min(work.prefix - prefix_done, max(0, limits.step_tokens - running))
        prompts = [] if preempted else rows.admit(limits.step_tokens - running - chunk)
        repeats = rows.steps_alike(cost, work.prefix) if running and not chunk and not prompts else 1
        middle = context + (repeats - 1) / 2
        keys = float(cost.keys_seen(middle + work.prefix).sum()) - _shared_again(cost, work.prefix, middle)
        ops = cost.prefill_ops(chunk, prefix_done) + sum(cost.prefill_ops(prompt, work.prefix) for prompt in prompts)
        prefix_done += chunk
        yield Step(repeats, running, running + chunk + sum(prompts), running + len(prompts), keys, ops)
        rows.draw(repeats)


def _shared_again(cost: Cost, prefix: int, context: Lengths) -> float:
    """Reads of the common prefix that a step saves, when every row but one finds it read already.

    Where a window has left part of the prefix behind, a row would have read only the rest.
    """
    if not prefix or len(context) < 2:
        return 0.0
    own = cost.keys_seen(context + prefix) - np.minimum(cost.keys_seen(context), cost.keys_seen(context + prefix))
    return float(own.sum() - own.max())
