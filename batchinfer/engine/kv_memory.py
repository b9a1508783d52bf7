"""How large the KV cache of a rank becomes: on a GPU measured, by running the largest step there can be before the cache exists.

Owns the measuring and what is said when too little is left; the arithmetic of blocks is that of `batchinfer.memory`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from batchinfer.config import Config, ConfigError, EngineConfig
from batchinfer.engine.batch import Batch
from batchinfer.engine.sequence import StepResult
from batchinfer.hardware import GIB, available_memory
from batchinfer.memory import gib, kv_blocks
from batchinfer.model.config import ModelShape
from batchinfer.model.parallel import TensorParallel

logger = logging.getLogger(__name__)

CPU_CACHE_LIMIT = 4 * GIB  # a CPU is for small models: more cache would only take memory from others
CPU_CACHE_SHARE = 3  # at most one part in so many of the host's free memory
PROFILE_CONTEXT = 4096  # attention works in pieces of bounded size, which this many tokens fill


class Profiler(Protocol):
    """A `ModelRunner` whose cache has a single block."""

    parallel: TensorParallel
    max_model_len: int
    device: torch.device

    def execute(self, batch: Batch) -> StepResult: ...


def measure_kv_blocks(profiler: Profiler, config: Config, shape: ModelShape, dtype: str) -> int:
    """How many blocks of KV cache this rank's memory holds beside weights and activations; the least of all ranks.

    On a GPU by running the largest batch there can be and reading the peak, on a CPU by a share of the free memory; never
    more than `max_num_seqs` sequences can fill. ConfigError: less than one sequence of `max_model_len` tokens.
    """
    size, max_model_len = profiler.parallel.size, profiler.max_model_len
    free = _free_for_cache(profiler, config)
    num_blocks = _least_of_all_ranks(kv_blocks(free, shape, dtype, size, config.engine, max_model_len), profiler.parallel)
    if num_blocks * config.engine.block_size < max_model_len:
        needed = max_model_len * shape.kv_bytes_per_token(dtype, size)
        raise ConfigError(
            f"model.max_model_len={max_model_len:,} needs {gib(needed)} of KV cache on each rank and {gib(max(0, free))} are "
            "available: lower model.max_model_len, or raise hw.tensor_parallel or engine.gpu_memory_utilization"
        )
    return num_blocks


def _free_for_cache(profiler: Profiler, config: Config) -> int:
    """Bytes of this rank's device that may become KV cache; below 0 when even the model does not fit the share allowed."""
    if profiler.device.type == "cuda":
        return _measure_cuda(profiler, config.engine)
    processes = max(profiler.parallel.size // config.hw.nodes_per_replica, config.hw.gpus_per_node)
    return min(available_memory() // CPU_CACHE_SHARE // processes, CPU_CACHE_LIMIT)


def _measure_cuda(profiler: Profiler, engine: EngineConfig) -> int:
    device = profiler.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    largest = largest_batch(engine, profiler.max_model_len)
    advice = "lower engine.max_num_batched_tokens, or raise hw.tensor_parallel"
    with require_fit(f"the working memory of a step of {largest.num_tokens:,} tokens and the weights", device, advice):
        profiler.execute(largest)
        torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    outside = total - free - torch.cuda.memory_reserved(device)  # the CUDA context, NCCL, other processes
    logger.info("largest step: peak %s, %s outside of torch; %s", gib(peak), gib(outside), memory_in_words(device))
    torch.cuda.empty_cache()
    return int(engine.gpu_memory_utilization * total) - peak - outside


@contextmanager
def require_fit(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """ConfigError, one sentence, when the device runs out of memory within."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigError(f"{what} do not fit what is left of {device} ({memory_in_words(device)}): {advice}") from None


def largest_batch(engine: EngineConfig, max_model_len: int) -> Batch:
    """`max_num_batched_tokens` tokens of `max_num_seqs` sequences that all draw a token, with as much context as matters.

    Runs over a cache of a single block: no token is stored, and every block table names block 0 only.
    """
    num_tokens, context = engine.max_num_batched_tokens, min(max_model_len, PROFILE_CONTEXT)
    num_seqs = min(engine.max_num_seqs, num_tokens)
    counts = np.ones(num_seqs, dtype=np.int32)
    for i in range(num_seqs):  # a few long chunks need more room than many short ones
        counts[i] += min(context - 1, num_tokens - int(counts.sum()))
    batch = Batch.empty(int(counts.sum()), num_seqs, -(-context // engine.block_size), num_seqs)
    batch.cu_seqlens_q[:] = np.concatenate([[0], np.cumsum(counts)])
    batch.context_lens[:] = context
    batch.positions[:] = np.concatenate([np.arange(context - count, context) for count in counts])
    batch.slot_mapping[:] = -1
    batch.sample_rows[:] = batch.cu_seqlens_q[1:] - 1
    batch.temperature[:], batch.top_p[:], batch.min_p[:], batch.top_k[:] = 1.0, 0.9, 0.1, 10
    batch.repetition_penalty[:], batch.presence_penalty[:], batch.frequency_penalty[:] = 1.1, 0.1, 0.1
    batch.sample_seqs[:] = batch.sample_slots[:] = np.arange(num_seqs)
    batch.num_logprobs[:] = 0
    for zeros in (batch.token_ids, batch.block_tables, batch.seeds, batch.sample_positions, batch.prompt_lens):
        zeros[:] = 0
    return batch


def _least_of_all_ranks(value: int, parallel: TensorParallel) -> int:
    if parallel.size == 1:
        return value
    least = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=parallel.host_group)
    return int(least)


def memory_in_words(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{gib(free)} of {gib(total)} free on {device}"
    return f"{gib(available_memory())} free on the host"
