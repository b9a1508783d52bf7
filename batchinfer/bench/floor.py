"""The shortest time that a GPU could take for given work: a simulation of steps from measured ceilings, in which only GEMMs,
reading the KV cache, prefill attention and all-reduces cost anything.

Every step packs waiting prompts beside the running rows up to STEP_TOKENS tokens. A GEMM takes its operations at the best rate
measured, or its weights read once, whichever is longer (Williams et al., "Roofline", 2009). Attention reads each row's own
keys and values once a step, and what all rows have in common once for all of them (Juravsky et al., "Hydragen", 2024).
Admission is bounded by the KV cache alone. Three answers: one thing after the other; the same at the rates that the GEMM library
reaches at each step's number of rows; and the longest of the three side by side. No torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchinfer.bench.workloads import BenchRequest
from batchinfer.model.config import DTYPE_BYTES, ModelShape

STEP_TOKENS = 2048  # GEMMs are at their best rate from here on; the engine's own budget must not move its floor
EXPECTED = 0.5  # a request is admitted when its prompt and this share of its completion fit: the rest runs while others end
Table = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Ceilings:
    """What one device was seen to reach. Rates are per second, of one rank's work."""

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
        return _on_line(self.gemm, rows)

    def all_reduce_seconds(self, num_bytes: int) -> float:
        """Beyond the largest that was measured it takes as long as its bytes do."""
        if not self.all_reduce:
            return 0.0
        largest, seconds = self.all_reduce[-1]
        if num_bytes > largest:
            return seconds * num_bytes / largest
        return _on_line(self.all_reduce, num_bytes)


def _on_line(table: Table, at: float) -> float:
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

    def keys_seen(self, context: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
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
    def of(cls, requests: Sequence[BenchRequest]) -> Work:
        prompts = [request.token_ids for request in requests]
        prefix = common_prefix(prompts) if len(prompts) > 1 else 0
        own = tuple(len(prompt) - prefix for prompt in prompts)
        return cls(prefix, own, tuple(request.max_tokens for request in requests))


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all begin with; at least one of each stays its own."""
    first, last = min(prompts), max(prompts)  # between these in order lie all others, and share what they share
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


@dataclass(frozen=True)
class Floor:
    """Seconds. `sequential_s` and `overlapped_s` are bounds; `library_s` is sequential at the GEMM library's own rates."""

    sequential_s: float
    library_s: float
    overlapped_s: float
    gemm_s: float
    attention_s: float
    all_reduce_s: float
    first_token_s: float  # of the first request
    steps: int


class _Rows:
    """Rows that wait and that run, and the tokens that they hold in the cache."""

    def __init__(self, work: Work, kv_tokens: int) -> None:
        self.waiting = deque(zip(work.prompts, work.completions, strict=True))
        self.capacity, self.used = kv_tokens, work.prefix
        self.context = np.zeros(0, dtype=np.int64)  # of each running row, without the common prefix
        self.left = np.zeros(0, dtype=np.int64)  # tokens that it will still draw

    def admit(self, room: int) -> list[int]:
        """Prompts that begin now: as long as there is room in the step and in the cache. One always may when nothing runs."""
        admitted: list[tuple[int, int]] = []
        while self.waiting and room > 0:
            prompt, completion = self.waiting[0]
            is_alone = not admitted and not len(self.context)
            if not is_alone and self.used + prompt + EXPECTED * completion > self.capacity:
                break
            admitted.append(self.waiting.popleft())
            self.used, room = self.used + prompt, room - prompt
        if admitted:
            prompts, completions = zip(*admitted, strict=True)
            self.context, self.left = np.append(self.context, prompts), np.append(self.left, completions)
        return [prompt for prompt, _ in admitted]

    def draw(self) -> None:
        """Every row gets a token; those that have all of theirs go."""
        self.context, self.left = self.context + 1, self.left - 1
        ended = self.left == 0
        self.used += len(self.context) - int(self.context[ended].sum())
        self.context, self.left = self.context[~ended], self.left[~ended]


def floor(work: Work, cost: Cost, ceilings: Ceilings, kv_tokens: int) -> Floor:
    """The floor of `work` with a KV cache of `kv_tokens` tokens."""
    rows = _Rows(work, kv_tokens)
    prefix_done, first_token_s = 0, 0.0
    gemm_s = library_s = attention_s = all_reduce_s = overlapped_s = 0.0
    steps = 0
    while rows.waiting or len(rows.context):
        running = len(rows.context)
        read = float(cost.keys_seen(rows.context + work.prefix).sum()) - _shared_again(cost, work.prefix, rows.context)
        chunk = min(work.prefix - prefix_done, max(0, STEP_TOKENS - running))
        prompts = rows.admit(STEP_TOKENS - running - chunk)
        tokens, outputs = running + chunk + sum(prompts), running + len(prompts)
        ops = cost.prefill_ops(chunk, prefix_done) + sum(cost.prefill_ops(prompt, work.prefix) for prompt in prompts)
        prefix_done += chunk
        gemm, library = gemm_seconds(cost, ceilings, tokens, outputs)
        attention = read * cost.kv_bytes / ceilings.read + ops / ceilings.attention
        all_reduce = cost.all_reduces * ceilings.all_reduce_seconds(tokens * cost.hidden_bytes)
        gemm_s, library_s = gemm_s + gemm, library_s + library
        attention_s, all_reduce_s = attention_s + attention, all_reduce_s + all_reduce
        overlapped_s += max(gemm, attention, all_reduce)
        first_token_s = first_token_s or (gemm_s + attention_s + all_reduce_s if outputs else 0.0)
        steps += 1
        rows.draw()
    rest = attention_s + all_reduce_s
    return Floor(gemm_s + rest, library_s + rest, overlapped_s, gemm_s, attention_s, all_reduce_s, first_token_s, steps)


def gemm_seconds(cost: Cost, ceilings: Ceilings, tokens: int, outputs: int) -> tuple[float, float]:
    """Of one step: at the roofline, and at the rate that the library reaches with so many rows."""
    ops, reading = cost.gemm_ops(tokens, outputs), cost.weight_bytes(outputs) / ceilings.read
    return max(ops / ceilings.best_gemm, reading), max(ops / ceilings.gemm_at(tokens), reading)


def _shared_again(cost: Cost, prefix: int, context: np.ndarray[Any, Any]) -> float:
    """Reads of the common prefix that a step saves, when every row but one finds it read already.

    Where a window has left part of the prefix behind, a row would have read only the rest.
    """
    if not prefix or len(context) < 2:
        return 0.0
    own = cost.keys_seen(context + prefix) - np.minimum(cost.keys_seen(context), cost.keys_seen(context + prefix))
    return float(own.sum() - own.max())
