"""What order and prefix caching are worth, predicted: the real scheduler over a model of what a step costs.

    python slurm/bench/simulate_scheduling.py --rows 3000

No model runs and no time passes: a step is priced by its tokens and by the context that it reads, for Llama-2-7B in bfloat16
on one H200. The prices come from the hardware's figures and an assumed share of them, so what counts is the ratio between two
lines, not the seconds. Rows reach the scheduler as in `worker.replica`: by windows of twice `max_num_seqs` rows.

The workloads: `mixed`, prompts of 64-1024 and completions of 64-512 tokens, all with the same max_tokens; `mixed, known`, the
same with max_tokens equal to what comes; `templates`, one of 8 instructions of 400 tokens before every prompt; `documents`,
twelve questions to each document of 1,500 tokens, both shuffled over all rows; `samples`, four samples of each prompt.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.ordering import order_window
from batchinfer.engine.scheduler import ScheduledBatch, Scheduler
from batchinfer.engine.sequence import Request, SamplingParams
from batchinfer.engine.sequence import Sequence as EngineSequence

BLOCK_SIZE, MAX_MODEL_LEN, VOCAB = 16, 4096, 32_000

PARAMETERS, LAYERS, HIDDEN = 6.7e9, 32, 4096
BANDWIDTH, FLOPS = 0.8 * 4.8e12, 0.6 * 989e12  # bytes/s and dense bf16 operations/s of an H200, as a good kernel gets them
WEIGHT_BYTES, KV_BYTES = 2 * PARAMETERS, 2 * 2 * LAYERS * HIDDEN  # of the model, and of a token
NUM_BLOCKS = int((0.9 * 141e9 - WEIGHT_BYTES - 3e9) / (KV_BYTES * BLOCK_SIZE))
LAUNCH_S = 0.5e-3


@dataclass(frozen=True)
class Row:
    token_ids: list[int]
    sampling: SamplingParams
    completion: int  # tokens that it will have; the scheduler is not told


def step_seconds(batch: ScheduledBatch) -> float:
    """Roofline of the linear layers, the reading of the decode rows' context, and the attention of the chunks."""
    tokens = batch.num_tokens
    seconds = LAUNCH_S + max(WEIGHT_BYTES / BANDWIDTH, tokens * 2 * PARAMETERS / FLOPS)
    for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
        end = seq.num_computed_tokens + count
        if count == 1:
            seconds += end * KV_BYTES / BANDWIDTH
        else:
            seconds += 4 * LAYERS * HIDDEN * count * (end - count / 2) / FLOPS
    return seconds


@dataclass
class Result:
    seconds: float = 0.0
    steps: int = 0
    tail_s: float = 0.0  # from the step that admitted the last row
    prompt_tokens: int = 0
    hit_tokens: int = 0
    preempted: int = 0
    completion_tokens: int = 0


def simulate(
    rows: list[Row], order: Callable[[Sequence[Row]], list[int]], caching: bool, max_num_seqs: int, budget: int
) -> Result:
    scheduler = Scheduler(BlockManager(NUM_BLOCKS, BLOCK_SIZE, caching), max_num_seqs, budget, MAX_MODEL_LEN)
    window = 2 * max_num_seqs
    queue = [start + i for start in range(0, len(rows), window) for i in order(rows[start : start + window])]
    result, admitted, last_admission_s = Result(), 0, 0.0
    while admitted < len(rows) or scheduler.has_work():
        ahead = max(8, max_num_seqs // 4, max_num_seqs - len(scheduler.running))
        while admitted < len(rows) and len(scheduler.waiting) < ahead:
            row = rows[queue[admitted]]
            request = Request(queue[admitted], row.token_ids, row.sampling, 0)
            scheduler.add(EngineSequence.from_request(request, 0.0, MAX_MODEL_LEN))
            admitted += 1
        waiting = len(scheduler.waiting)
        batch = scheduler.schedule()
        result.seconds += step_seconds(batch)
        result.steps += 1
        result.hit_tokens += batch.prefix_hit_tokens
        result.preempted += len(batch.preempted)
        if len(scheduler.waiting) < waiting:
            last_admission_s = result.seconds
        advance(scheduler, batch, rows)
    result.tail_s = result.seconds - last_admission_s
    result.prompt_tokens = sum(len(row.token_ids) for row in rows)
    result.completion_tokens = sum(row.completion for row in rows)
    return result


def advance(scheduler: Scheduler, batch: ScheduledBatch, rows: list[Row]) -> None:
    for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
        seq.num_computed_tokens += count
        seq.num_prefilled_tokens = max(seq.num_prefilled_tokens, seq.num_computed_tokens)
        if seq.num_computed_tokens == seq.num_tokens:
            seq.token_ids.append(0)
            if seq.num_completion_tokens == rows[seq.request.request_id].completion:
                scheduler.finish(seq)


def long_first(rows: Sequence[Row]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: -len(rows[i].token_ids) - rows[i].sampling.max_tokens)


def workloads(count: int) -> dict[str, list[Row]]:
    rng = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(length)]

    def row(prompt: list[int], completion: int, max_tokens: int | None = None) -> Row:
        return Row(prompt, SamplingParams(max_tokens=max_tokens or completion), completion)

    templates = [tokens(400) for _ in range(8)]
    documents = [tokens(1500) for _ in range(max(1, count // 12))]
    lengths = [(rng.randint(64, 1024), rng.randint(64, 512)) for _ in range(count)]
    prompts = [tokens(rng.randint(64, 1024)) for _ in range(count // 4)]
    return {
        "mixed": [row(tokens(prompt), completion, 512) for prompt, completion in lengths],
        "mixed, known": [row(tokens(prompt), completion) for prompt, completion in lengths],
        "templates": [row(rng.choice(templates) + tokens(rng.randint(32, 256)), rng.randint(32, 256), 256) for _ in range(count)],
        "documents": [row(rng.choice(documents) + tokens(rng.randint(16, 64)), rng.randint(16, 128), 128) for _ in range(count)],
        "samples": [row(prompt, rng.randint(64, 512), 512) for prompt in prompts for _ in range(4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    args = parser.parse_args()
    orders: dict[str, Callable[[Sequence[Row]], list[int]]] = {
        "as it comes": lambda rows: list(range(len(rows))),
        "long first": long_first,
        "order_window": lambda rows: order_window([row.token_ids for row in rows]),
    }
    print(f"{NUM_BLOCKS:,} blocks of {BLOCK_SIZE} tokens, {args.rows:,} rows")
    print(
        f"{'workload':14}{'order':14}{'cache':>6}{'seconds':>9}{'steps':>8}{'hits':>7}{'preempted':>11}{'tail s':>8}{'tok/s':>9}"
    )
    for name, rows in workloads(args.rows).items():
        for order_name, order in orders.items():
            for caching in (False, True):
                r = simulate(rows, order, caching, args.max_num_seqs, args.max_num_batched_tokens)
                cells = f"{name:14}{order_name:14}{'on' if caching else 'off':>6}{r.seconds:9.1f}{r.steps:8,}"
                speed = r.completion_tokens / r.seconds
                print(f"{cells}{r.hit_tokens / r.prompt_tokens:7.1%}{r.preempted:11,}{r.tail_s:8.1f}{speed:9,.0f}", flush=True)


if __name__ == "__main__":
    main()
