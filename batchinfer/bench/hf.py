"""`python -m batchinfer.bench.hf FOLDER`: Hugging Face transformers on the workloads of a bench.

Two ways: `one by one`, a call of `generate` for each request, which is what a first script does, and `batches of N`, requests
in an order drawn once, padded on the left, each batch as long as its longest completion. Both stop starting anew after
`bench.peer_s` seconds; how many requests were run is told, and the rest is extrapolated by whoever shows it.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from batchinfer.bench.task import Answer, Task, Timing, run_side, totals
from batchinfer.bench.workloads import BenchRequest, Workload
from batchinfer.model.loader import random_tensor
from batchinfer.worker.__main__ import choose_device
from batchinfer.worker.replica import process_age

SIDE = "hf"
ONE_BY_ONE = "one by one"
BATCH = 16
WARMUP_TOKENS = 4


def load_model(task: Task, device: torch.device) -> Any:
    """The checkpoint's weights, or the same random ones that our own loader makes, under the same names."""
    dtype = getattr(torch, task.config.model.dtype)
    if task.config.model.load_format == "safetensors":
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(task.checkpoint, dtype=dtype, attn_implementation="sdpa")
        model.to(device)
    else:
        model = random_model(task, dtype, device)
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


@torch.no_grad()
def random_model(task: Task, dtype: torch.dtype, device: torch.device) -> Any:
    config = transformers.AutoConfig.from_pretrained(task.checkpoint)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape), task.config.seed, dtype, device))
    return model


@torch.inference_mode()
def generate(model: Any, requests: Sequence[BenchRequest], num_tokens: int) -> list[list[int]]:
    """`num_tokens` new tokens of each."""
    longest = max(len(request.token_ids) for request in requests)
    ids = torch.tensor([[0] * (longest - len(r.token_ids)) + r.token_ids for r in requests], device=model.device)
    pads = torch.tensor([longest - len(request.token_ids) for request in requests], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= pads[:, None]).long()
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens)
    made: list[list[int]] = tokens[:, longest:].tolist()
    assert len(made[0]) == num_tokens, "transformers stopped early"
    return made


def batches(workload: Workload, size: int) -> Iterator[list[BenchRequest]]:
    """All requests in an order drawn once, so that what is run first stands for the whole."""
    order = list(workload.requests)
    random.Random(0).shuffle(order)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def run(model: Any, workload: Workload, size: int, limit_s: float) -> Timing:
    """Batches of `size` until all are done, or until `limit_s` seconds are over."""
    generate(model, next(batches(workload, size)), WARMUP_TOKENS)
    done: list[BenchRequest] = []
    seconds = 0.0
    for batch in batches(workload, size):
        if seconds >= limit_s:
            break
        begin = time.perf_counter()
        generate(model, batch, max(request.max_tokens for request in batch))  # its tokens are on the host, so it has ended
        seconds += time.perf_counter() - begin
        done += batch
    return Timing(**totals(done), seconds=seconds, first_token_s=_first_token(model, workload))


def _first_token(model: Any, workload: Workload) -> float | None:
    """Of a request that is alone; with several it is no property of generate()."""
    if len(workload.requests) > 1:
        return None
    begin = time.perf_counter()
    generate(model, workload.requests, 1)
    return time.perf_counter() - begin


def work(task: Task) -> None:
    transformers.logging.set_verbosity_error()
    device = choose_device(task.config)
    answer = Answer(versions={"transformers": transformers.__version__}, phases={"import": process_age()})
    model = load_model(task, device)
    answer.phases["ready"] = process_age()
    print(f"{answer.phases['ready']:.1f} s: {task.checkpoint} is loaded", flush=True)
    for workload in task.workloads():
        sizes = {ONE_BY_ONE: 1}
        if len(workload.requests) > 1:
            sizes[f"batches of {min(BATCH, len(workload.requests))}"] = BATCH
        for mode, size in sizes.items():
            try:
                answer.put(workload, mode, run(model, workload, size, task.config.bench.peer_s))
            except torch.OutOfMemoryError:
                answer.failures[workload.name] = f"{mode}: out of memory"
            answer.save(task.answer_file(SIDE))
            print(f"{process_age():.1f} s: {workload.name}, {mode}: done", flush=True)


if __name__ == "__main__":
    sys.exit(run_side(work, sys.argv[1:]))
