"""`python -m batchinfer.bench.ours FOLDER`: this package's engine on the workloads of a bench, timed without files or text.

Started like a worker (by torchrun where a replica has several ranks), it comes up as one does; then every workload is added at
once and stepped to its end. Between two of them nothing is left in the prefix cache.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence

import torch

from batchinfer.bench.task import Answer, Task, Timing, repeated, run_side, totals
from batchinfer.bench.workloads import BenchRequest, Workload
from batchinfer.config import BenchConfig
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine, build_engine
from batchinfer.engine.sequence import Request, SamplingParams
from batchinfer.job.vitals import Pulse
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel, init_distributed
from batchinfer.worker.__main__ import choose_device, follow, keep_out_of_garbage_collection
from batchinfer.worker.replica import process_age

SIDE = "batchinfer"


def run_workload(engine: Engine, requests: Sequence[BenchRequest]) -> Timing:
    """Adds all requests and steps until they are done. RuntimeError: one of them did not come to its end."""
    made = [to_engine(number, request) for number, request in enumerate(requests)]
    drawn, first_token_s, sums = 0, None, dict.fromkeys(("preempted", "recomputed_tokens", "prefix_hit_tokens"), 0)
    peak = steps = 0
    begin = time.perf_counter()
    for request in made:
        engine.add(request)
    while engine.has_work():
        outputs, stats = engine.step()
        steps += 1
        peak = max(peak, stats.running)
        for name in sums:
            sums[name] += getattr(stats, name)
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id}: {output.error[1]}")
            drawn += len(output.token_ids)
        if first_token_s is None and outputs:
            first_token_s = time.perf_counter() - begin
    seconds = time.perf_counter() - begin
    counts = totals(requests)
    assert drawn == counts["tokens_out"], f"{drawn:,} tokens came out, {counts['tokens_out']:,} were asked for"
    return Timing(
        **counts,
        seconds=seconds,
        first_token_s=first_token_s,
        peak_running=peak,
        steps=steps,
        preemptions=sums["preempted"],
        recomputed_tokens=sums["recomputed_tokens"],
        prefix_hit_tokens=sums["prefix_hit_tokens"],
    )


def to_engine(number: int, request: BenchRequest) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
    return Request(number, request.token_ids, sampling, seed=0)


def forget_prefixes(engine: Engine) -> None:
    """Empties the prefix cache of an engine without work: a repeated workload must find nothing of the time before."""
    assert not engine.has_work(), "sequences hold blocks"
    blocks = engine.scheduler.blocks
    engine.scheduler.blocks = BlockManager(blocks.num_blocks, blocks.block_size, blocks.prefix_caching)


def measure(engine: Engine, workload: Workload, bench: BenchConfig) -> Timing:
    """Warm-up, then the repetitions."""

    def once() -> Timing:
        forget_prefixes(engine)
        return run_workload(engine, workload.requests)

    if bench.warmup:
        run_workload(engine, workload.requests[: bench.warmup])
    return repeated(once, bench.repeat)


def lead(task: Task, parallel: TensorParallel, device: torch.device) -> None:
    """Rank 0."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    answer = Answer(versions=versions, phases={"import": process_age()})
    engine = build_engine(task.config, load_shape(task.config.model), parallel, device)
    answer.phases |= engine.phases | {"ready": process_age()}
    keep_out_of_garbage_collection()
    blocks = engine.scheduler.blocks
    answer.kv_tokens = blocks.num_blocks * blocks.block_size
    try:
        for workload in task.workloads():
            answer.put(workload, "", measure(engine, workload, task.config.bench))
            answer.save(task.answer_file(SIDE))
    finally:
        engine.close()


def work(task: Task) -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {os.environ.get('RANK', '0')} %(name)s: %(message)s")
    device = choose_device(task.config)
    parallel = init_distributed(device)
    if parallel.rank == 0:
        lead(task, parallel, device)
    else:
        follow(task.config, parallel, device, Pulse())
    parallel.close()


if __name__ == "__main__":
    sys.exit(run_side(work, sys.argv[1:]))
