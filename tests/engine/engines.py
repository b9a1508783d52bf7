"""Engines over real models for tests: one load of the weights, then as many pools and budgets as a test wants."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from batchinfer.config import Config, EngineConfig, ModelConfig
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine
from batchinfer.engine.model_runner import ModelRunner
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import Request, SamplingParams

CPU = torch.device("cpu")
MAX_MODEL_LEN = 96


def config_for(
    checkpoint: Path, dtype: str = "float64", max_num_seqs: int = 8, budget: int = 32, overlap: bool = False
) -> Config:
    return Config(
        model=ModelConfig(path=str(checkpoint), dtype=dtype, max_model_len=MAX_MODEL_LEN),
        engine=EngineConfig(block_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, overlap=overlap),
    )


def make_requests(count: int, vocab_size: int, **sampling: object) -> list[Request]:
    """Prompts of ragged lengths from 1 to 40 tokens, and 4 to 16 tokens to generate."""
    rng = random.Random(7)
    return [
        Request(
            i,
            [rng.randrange(vocab_size) for _ in range(1 + (i * 17) % 40)],
            SamplingParams(**{"max_tokens": 4 + (i * 5) % 13, **sampling}),  # type: ignore[arg-type]
            seed=rng.getrandbits(64),
        )
        for i in range(count)
    ]


def engine_with(
    runner: ModelRunner,
    num_blocks: int = 200,
    max_num_seqs: int = 8,
    budget: int = 32,
    overlap: bool = False,
    prefix_caching: bool = False,
) -> Engine:
    """An engine with another pool and other limits over the same weights."""
    config = EngineConfig(block_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, overlap=overlap)
    dtype = runner.kv_cache.dtype
    fresh = ModelRunner(runner.shape, runner.model, runner.parallel, config, MAX_MODEL_LEN, dtype, CPU, num_blocks)
    scheduler = Scheduler(BlockManager(num_blocks, 4, prefix_caching), max_num_seqs, budget, MAX_MODEL_LEN)
    return Engine(fresh, scheduler, frozenset(runner.shape.eos_token_ids), overlap)


def complete(engine: Engine, requests: list[Request]) -> tuple[dict[int, list[int]], int]:
    """All completions by request id, and how often something was preempted."""
    completions: dict[int, list[int]] = {request.request_id: [] for request in requests}
    preempted = 0
    for request in requests:
        engine.add(request)
    while engine.has_work():
        outputs, stats = engine.step()
        preempted += stats.preempted
        for output in outputs:
            completions[output.request_id] += output.token_ids
    return completions, preempted
