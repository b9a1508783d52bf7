"""The operations that a model and the engine are made of. What they compute is specified in `reference.py`."""

from batchinfer.ops.reference import (
    LogProbabilities,
    apply_penalties,
    apply_token_bitmask,
    draw,
    greedy,
    log_probabilities,
    paged_attention,
    rms_norm,
    rope_and_cache,
    sample,
    silu_and_mul,
)

__all__ = [
    "LogProbabilities",
    "apply_penalties",
    "apply_token_bitmask",
    "draw",
    "greedy",
    "log_probabilities",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_and_mul",
]
