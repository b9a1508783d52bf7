"""The shortest time that a GPU could take for given work: simulated steps priced at measured ceilings, in which only GEMMs,
reading the KV cache, prefill attention and all-reduces cost anything.

Admission is bounded by the KV cache alone. Three answers: one thing after the other; the same at the rates that the GEMM library
reaches at each step's number of rows; and the longest of the three side by side. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchinfer.bench.workloads import BenchRequest
from batchinfer.roofline import Ceilings, Cost, Limits, Work, simulate

STEP_TOKENS = 2048  # GEMMs are at their best rate from here on; the engine's own budget must not move its floor
EXPECTED = 0.5  # a request is admitted when its prompt and this share of its completion fit: the rest runs while others end


def work_of(requests: Sequence[BenchRequest]) -> Work:
    """A bench's requests as lengths."""
    return Work.of([request.token_ids for request in requests], [request.max_tokens for request in requests])


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


def floor(work: Work, cost: Cost, ceilings: Ceilings, kv_tokens: int) -> Floor:
    """The floor of `work` with a KV cache of `kv_tokens` tokens."""
    first_token_s = 0.0
    gemm_s = library_s = attention_s = all_reduce_s = overlapped_s = 0.0
    steps = 0
    for step in simulate(work, cost, Limits(kv_tokens, STEP_TOKENS, expected=EXPECTED)):
        times = step.repeats
        gemm, library = gemm_seconds(cost, ceilings, step.tokens, step.outputs)
        attention = step.keys * cost.kv_bytes / ceilings.read + step.prefill_ops / ceilings.attention
        all_reduce = cost.all_reduces * ceilings.all_reduce_seconds(step.tokens * cost.hidden_bytes)
        gemm_s, library_s = gemm_s + times * gemm, library_s + times * library
        attention_s, all_reduce_s = attention_s + times * attention, all_reduce_s + times * all_reduce
        overlapped_s += times * max(gemm, attention, all_reduce)
        first_token_s = first_token_s or (gemm_s + attention_s + all_reduce_s if step.outputs else 0.0)
        steps += times
    rest = attention_s + all_reduce_s
    return Floor(gemm_s + rest, library_s + rest, overlapped_s, gemm_s, attention_s, all_reduce_s, first_token_s, steps)


def gemm_seconds(cost: Cost, ceilings: Ceilings, tokens: int, outputs: int) -> tuple[float, float]:
    """Of one step: at the roofline, and at the rate that the library reaches with so many rows."""
    ops, reading = cost.gemm_ops(tokens, outputs), cost.weight_bytes(outputs) / ceilings.read
    return max(ops / ceilings.best_gemm, reading), max(ops / ceilings.gemm_at(tokens), reading)
