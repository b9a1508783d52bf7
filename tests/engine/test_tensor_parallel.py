"""Two and four ranks over gloo, driven by rank 0, give the tokens of one."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from batchinfer.config import Config
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine, build_engine, serve
from batchinfer.engine.model_runner import build_runner
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import Request
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel, init_distributed
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, MAX_MODEL_LEN, complete, config_for, make_requests
from tests.engine.mixtures import MODEL, mixed_requests, run_mixture
from tests.engine.told import assert_near


def join(rank: int, size: int, port: int) -> TensorParallel:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    return init_distributed(CPU)


def requests_for(vocab_size: int) -> list[Request]:
    greedy = make_requests(6, vocab_size, ignore_eos=True)
    drawn = make_requests(12, vocab_size, ignore_eos=True, temperature=0.8)[6:]
    return greedy + drawn


def run_rank(rank: int, size: int, port: int, config: Config, answer: Path) -> None:
    parallel = join(rank, size, port)
    shape = load_shape(config.model)
    if rank == 0:
        engine = build_engine(config, shape, parallel, CPU)
        torch.save(complete(engine, requests_for(shape.vocab_size))[0], answer)
        engine.close()
    else:
        serve(build_runner(config, shape, parallel, CPU))
    parallel.close()  # gloo's threads abort a process that exits under them


def told_by_ranks(size: int, config: Config, answer: Path) -> dict[int, list[int]]:
    mp.spawn(run_rank, args=(size, free_port(), config, answer), nprocs=size)
    told: dict[int, list[int]] = torch.load(answer)
    return told


def told_by_one(config: Config) -> dict[int, list[int]]:
    shape = load_shape(config.model)
    return complete(build_engine(config, shape, TensorParallel(), CPU), requests_for(shape.vocab_size))[0]


def run_mixture_on_rank(rank: int, size: int, port: int, checkpoint: Path, answer: Path) -> None:
    """Everything that an engine can do, in a pool so small that it preempts."""
    config, parallel = config_for(checkpoint, overlap=True), join(rank, size, port)
    runner = build_runner(config, load_shape(config.model), parallel, CPU)
    if rank == 0:
        scheduler = Scheduler(BlockManager(20, 4, prefix_caching=True), 8, 32, MAX_MODEL_LEN)
        engine = Engine(runner, scheduler, frozenset(runner.shape.eos_token_ids), overlap=True)
        requests = mixed_requests(24)
        told, steps = run_mixture(engine, requests, {request.request_id: 2 for request in requests[::5]})
        assert sum(step.preempted for step in steps) > 0 and sum(step.prefix_hit_tokens for step in steps) > 0
        torch.save(told, answer)
        engine.close()
    else:
        serve(runner)
    parallel.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize("overlap", [False, True])
def test_two_ranks_equal_one(tmp_path: Path, overlap: bool) -> None:
    save_checkpoint(tmp_path)
    config = config_for(tmp_path, overlap=overlap)
    assert told_by_ranks(2, config, tmp_path / "answer.pt") == told_by_one(config)


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads", "vocab_size", "tied"),
    [
        ((2, 4), 4, 2, 131, False),  # one KV head for each of two ranks, or for two of four; 66 and 65 rows, or 33, 33, 33 and 32
        ((4,), 4, 1, 129, True),  # one KV head for all; the last rank has 30 rows where the others have 33
        pytest.param((8,), 8, 2, 133, False, marks=pytest.mark.slow),  # a query head each, a KV head for four
    ],
)
def test_ranks_equal_one_in_float32(
    tmp_path: Path, sizes: tuple[int, ...], heads: int, kv_heads: int, vocab_size: int, tied: bool
) -> None:
    """With every rank holding the same bits in every step."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab_size}
    save_checkpoint(tmp_path, **shape, tie_word_embeddings=tied, dtype=torch.float32)
    plain = config_for(tmp_path, dtype="float32", overlap=True)
    config = replace(plain, engine=replace(plain.engine, check_ranks=True))
    one = told_by_one(plain)
    assert max(token for told in one.values() for token in told) >= vocab_size - vocab_size // 4, "the last rank says nothing"
    for size in sizes:
        assert told_by_ranks(size, config, tmp_path / "answer.pt") == one


def test_everything_at_once_on_two_ranks_equals_one_by_one(tmp_path: Path) -> None:
    checkpoint, answer = tmp_path / "checkpoint", tmp_path / "answer.pt"
    save_checkpoint(checkpoint, **MODEL)
    mp.spawn(run_mixture_on_rank, args=(2, free_port(), checkpoint, answer), nprocs=2)
    config = config_for(checkpoint)
    engine = build_engine(config, load_shape(config.model), TensorParallel(), CPU)
    requests = mixed_requests(24)
    for number, told in torch.load(answer, weights_only=False).items():
        alone, count = run_mixture(engine, [requests[number]])[0][number], len(told.token_ids)
        assert told.token_ids == alone.token_ids[:count] and (count == len(alone.token_ids) or number % 5 == 0)
        assert_near(told.logprobs, alone.logprobs and alone.logprobs[:count])
        assert_near(told.prompt, alone.prompt)
