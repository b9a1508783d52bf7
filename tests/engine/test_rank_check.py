"""Two ranks over gloo that compare themselves in every step: in order when they agree, and named when they part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from batchinfer.config import Config
from batchinfer.engine.batch import Batch
from batchinfer.engine.engine import Engine, build_engine, serve
from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.rank_check import RankCheck, RanksDiffer
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, make_requests
from tests.engine.test_tensor_parallel import free_port, join


def config(checkpoint: Path) -> Config:
    plain = config_for(checkpoint, overlap=True)
    return replace(plain, engine=replace(plain.engine, check_ranks=True))


def said(work: Any, *arguments: Any) -> str:
    """What `work` fails with. No traceback outlives this: its frames hold the process group, whose threads abort a process that
    exits under them."""
    try:
        work(*arguments)
    except RanksDiffer as error:
        return str(error)
    raise AssertionError("the ranks agree")


def batch(rank: int) -> Batch:
    made = Batch.empty(num_tokens=3, num_seqs=1, num_blocks=1, num_samples=1)
    made.buffer[8:] = 0
    made.positions[2] = rank
    return made


def part_by_hand(parallel: TensorParallel) -> list[str]:
    """What is said when this rank's values are its rank's number somewhere."""
    check, rank = RankCheck(parallel), parallel.rank
    hidden = torch.zeros(3, 4, dtype=torch.bfloat16)
    check.forward(batch(0), hidden)
    check.tokens(torch.tensor([7, 8], dtype=torch.int32))
    other = hidden.clone()
    other[1, 2] = -0.0 if rank else 0.0  # equal as numbers, and yet other bits
    return [
        said(check.forward, batch(rank), hidden),
        said(check.forward, batch(0), other),
        said(check.tokens, torch.tensor([7, 8 + rank], dtype=torch.int32)),
        said(check.tokens, torch.zeros(2 + rank, dtype=torch.int32)),
    ]


def drive(engine: Engine) -> dict[int, list[int]]:
    return complete(engine, make_requests(6, engine.runner.shape.vocab_size, ignore_eos=True))[0]


def run_rank(rank: int, size: int, port: int, checkpoint: Path) -> None:
    checked, parallel = config(checkpoint), join(rank, size, port)
    shape = load_shape(checked.model)
    runner: ModelRunner
    if rank == 0:
        engine = build_engine(checked, shape, parallel, CPU)
        told = drive(engine)
        engine.close()
        runner = engine.runner
    else:
        runner = build_runner(checked, shape, parallel, CPU)
        serve(runner)
        told = {}
    assert runner.check is not None
    steps = runner.check._step
    by_hand = part_by_hand(parallel)
    if rank == 1:
        runner.model.norm.weight[0] *= 1 + 2**-50
    parted = said(drive, engine) if rank == 0 else said(serve, runner)
    torch.save((told, steps, by_hand, parted), checkpoint / f"said{rank}.pt")
    parallel.close()


def test_ranks_that_agree_go_on_and_one_that_parts_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    mp.spawn(run_rank, args=(2, free_port(), tmp_path), nprocs=2)
    told, steps, by_hand, parted = torch.load(tmp_path / "said0.pt")
    plain = config_for(tmp_path)
    assert told == drive(build_engine(plain, load_shape(plain.model), TensorParallel(), CPU))
    assert steps > 10
    assert by_hand == [
        "step 1: batches of rank 1 differ from those of rank 0, first in positions",
        "step 2: hidden states of rank 1 differ from those of rank 0, first in row 1 of 3",
        "step 2: drawn tokens of rank 1 differ from those of rank 0, first in row 1 of 2",
        "step 2: drawn tokens of rank 1 differ from those of rank 0, first in how many there are",
    ]
    assert parted.startswith(f"step {steps + 1}: hidden states of rank 1 differ from those of rank 0, first in row 0 of ")
    assert torch.load(tmp_path / "said1.pt")[1:] == (steps, by_hand, parted), "every rank says the same"


def test_one_rank_and_plain_runs_check_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    checked = config(tmp_path)
    assert build_runner(checked, load_shape(checked.model), TensorParallel(), CPU).check is None
