"""Two ranks over gloo, driven by rank 0, give the tokens of one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from batchinfer.engine.engine import build_engine, serve
from batchinfer.engine.model_runner import build_runner
from batchinfer.engine.sequence import Request
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel, init_distributed
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, make_requests


def requests_for(vocab_size: int) -> list[Request]:
    greedy = make_requests(6, vocab_size, ignore_eos=True)
    drawn = make_requests(12, vocab_size, ignore_eos=True, temperature=0.8)[6:]
    return greedy + drawn


def run_rank(rank: int, size: int, port: int, checkpoint: Path, answer: Path, overlap: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    config = config_for(checkpoint, overlap=overlap)
    shape = load_shape(config.model)
    parallel = init_distributed(CPU)
    if rank == 0:
        engine = build_engine(config, shape, parallel, CPU)
        torch.save(complete(engine, requests_for(shape.vocab_size))[0], answer)
        engine.close()
    else:
        serve(build_runner(config, shape, parallel, CPU))
    parallel.close()  # gloo's threads abort a process that exits under them


@pytest.mark.parametrize("overlap", [False, True])
def test_two_ranks_equal_one(tmp_path: Path, overlap: bool) -> None:
    checkpoint, answer = tmp_path / "checkpoint", tmp_path / "answer.pt"
    save_checkpoint(checkpoint)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, args=(2, port, checkpoint, answer, overlap), nprocs=2)
    config = config_for(checkpoint)
    shape = load_shape(config.model)
    engine = build_engine(config, shape, TensorParallel(), CPU)
    assert torch.load(answer) == complete(engine, requests_for(shape.vocab_size))[0]
