"""`python -m batchinfer.bench.vllm FOLDER`: vLLM on the workloads of a bench, as it comes (written against 0.20).

CUDA graphs, compilation, prefix caching and batch sizes are its own defaults; memory share, dtype, tensor parallelism and the
longest sequence are the task's. Random weights are its `dummy` ones: of the same shapes, which is all that time depends on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from batchinfer.bench.task import Answer, Task, Timing, repeated, run_side, totals
from batchinfer.bench.workloads import BenchRequest, Workload
from batchinfer.worker.replica import process_age

SIDE = "vllm"
# One process where one is enough, and no sampler that is compiled on the spot: all is greedy.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def load(task: Task, workloads: Sequence[Workload]) -> Any:
    from vllm import LLM

    config = task.config
    return LLM(
        model=task.checkpoint,
        load_format="auto" if config.model.load_format == "safetensors" else "dummy",
        dtype=config.model.dtype,
        tensor_parallel_size=int(config.hw.tensor_parallel),
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        max_model_len=max(workload.longest for workload in workloads),
        seed=config.seed,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )


def generate(llm: Any, requests: Sequence[BenchRequest], max_tokens: int | None = None) -> Timing:
    """All requests at once, to their ends or to `max_tokens`."""
    from vllm import SamplingParams

    counts = [max_tokens or request.max_tokens for request in requests]
    sampling = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for count in counts]
    prompts = [{"prompt_token_ids": request.token_ids} for request in requests]
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    drawn = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert drawn == sum(counts), f"{drawn:,} tokens came out, {sum(counts):,} were asked for"
    return Timing(**totals(requests), seconds=seconds)


def measure(llm: Any, task: Task, workload: Workload) -> Timing:
    """Warm-up, then the repetitions; of a request that is alone also the time to its first token."""
    bench = task.config.bench
    if bench.warmup:
        generate(llm, workload.requests[: bench.warmup])
    timing = repeated(lambda: generate(llm, workload.requests), bench.repeat)
    if len(workload.requests) > 1:
        return timing
    first = repeated(lambda: generate(llm, workload.requests, 1), bench.repeat).seconds
    return Timing(**{**vars(timing), "first_token_s": first})


def kv_tokens(llm: Any) -> int | None:
    """What its KV cache holds; None where a version keeps that elsewhere: no figure is worth losing for it."""
    cache = getattr(llm.llm_engine, "cache_config", None)
    blocks = getattr(cache, "num_gpu_blocks", None)
    return blocks * cache.block_size if cache is not None and blocks else None


def work(task: Task) -> None:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    import vllm

    answer = Answer(versions={"vllm": vllm.__version__}, phases={"import": process_age()})
    workloads = task.workloads()
    llm = load(task, workloads)
    answer.phases["ready"] = process_age()
    answer.kv_tokens = kv_tokens(llm)
    for workload in workloads:
        answer.put(workload, "", measure(llm, task, workload))
        answer.save(task.answer_file(SIDE))


if __name__ == "__main__":
    sys.exit(run_side(work, sys.argv[1:]))
