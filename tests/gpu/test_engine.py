"""The engine on a GPU: in float32 like the engine on the CPU, for every kind of sampling, in turn and overlapped."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import torch

from batchinfer.config import Config, EngineConfig, ModelConfig
from batchinfer.engine.batch import BatchBuilder
from batchinfer.engine.engine import build_engine
from batchinfer.engine.model_runner import build_runner
from batchinfer.engine.sampler import TokenMask
from batchinfer.engine.scheduler import ScheduledBatch
from batchinfer.engine.sequence import Request, SamplingParams, Sequence
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.engine.engines import make_requests
from tests.engine.told import KINDS, Told, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

TINY = str(files("batchinfer.tiny") / "model")


def requests() -> list[Request]:
    made = [request for kind in KINDS.values() for request in make_requests(6, 4096, ignore_eos=True, **kind)]
    return [Request(i, request.prompt_token_ids, request.sampling, request.seed) for i, request in enumerate(made)]


def told_on(device: str, **engine: object) -> list[Told]:
    limits = EngineConfig(max_num_seqs=16, max_num_batched_tokens=64, gpu_memory_utilization=0.2, **engine)  # type: ignore[arg-type]
    config = Config(model=ModelConfig(path=TINY, dtype="float32"), engine=limits)
    built = build_engine(config, load_shape(config.model), TensorParallel(), torch.device(device))
    return run(built, requests())


def largest_gap(ours: Told, theirs: Told) -> float:
    """Of the log-probabilities of the same tokens."""
    pairs = [
        *zip(ours.logprobs or [], theirs.logprobs or [], strict=True),
        *zip(ours.prompt or [], theirs.prompt or [], strict=True),
    ]
    return max((abs(a.logprob - b.logprob) for a, b in pairs if a is not None and b is not None), default=0.0)


def test_tokens_and_log_probabilities_are_those_of_the_cpu() -> None:
    cpu, gpu = told_on("cpu"), told_on("cuda")
    same = [(a, b) for a, b in zip(gpu, cpu, strict=True) if a.token_ids == b.token_ids]
    assert len(cpu) - len(same) <= 2, "more rows differ than near-ties explain"
    assert max(largest_gap(a, b) for a, b in same) < 1e-3


def test_overlapped_steps_draw_the_same_as_steps_in_turn() -> None:
    overlapped, in_turn = told_on("cuda", overlap=True), told_on("cuda", overlap=False)
    assert sum(a.token_ids != b.token_ids for a, b in zip(overlapped, in_turn, strict=True)) <= 2


def test_a_draw_is_launched_while_the_device_is_busy() -> None:
    """Masks, min_tokens, penalties and log-probabilities make no host wait. All greedy: random draws by the reference do."""
    count, limits = 512, EngineConfig(max_num_seqs=512, max_num_batched_tokens=5120, gpu_memory_utilization=0.2, overlap=True)
    config = Config(model=ModelConfig(path=TINY, dtype="float32", max_model_len=64), engine=limits)
    shape = load_shape(config.model)
    runner = build_runner(config, shape, TensorParallel(), torch.device("cuda"))
    sampling = [SamplingParams(min_tokens=2, repetition_penalty=1.3, logprobs=4 if i % 2 else None) for i in range(count)]
    sequences = [Sequence.from_request(Request(i, [5] * 9, sampling[i], 0), 0.0, 64) for i in range(count)]
    for i, seq in enumerate(sequences):
        seq.block_table = [i]
    builder = BatchBuilder(count, 64 // limits.block_size, limits.block_size, frozenset(shape.eos_token_ids))
    batch = builder.build(ScheduledBatch(sequences, [9] * count))
    mask = TokenMask(np.arange(0, count, 3), np.full((len(range(0, count, 3)), shape.vocab_size // 32), -1, dtype=np.int32))
    first = runner.sample(batch, runner.forward(batch), mask).result()  # loads kernels and pins memory
    forward = runner.forward(batch)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # clock cycles: two seconds
    drawn = runner.sample(batch, forward, mask)
    assert drawn.arrived is not None and not drawn.arrived.query(), "the host has waited"
    assert drawn.result().token_ids == first.token_ids
