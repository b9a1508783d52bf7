"""How near a row's tokens stay to those it gets alone, whatever it is batched with: in each arithmetic, on this host's device.

    python slurm/bench/nearness.py --rows 128 --dtypes float64,float32,bfloat16

The shipped model completes the shipped prompts, each alone and its prompt in one piece; then in every way in which an engine
may cut the same work. A row differs when one of its tokens does; from there on it is another text, so log-probabilities are
compared up to that token. In float64 nothing may differ (the tests hold that); elsewhere only near-ties do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import torch

from batchinfer.config import Config, EngineConfig, ModelConfig
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine
from batchinfer.engine.model_runner import ModelRunner, build_runner
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import Request, SamplingParams
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel

TINY = Path(str(files("batchinfer.tiny")))
BLOCK_SIZE = 16
Row = tuple[list[int], list[float]]  # token ids and their log-probabilities


@dataclass(frozen=True)
class Way:
    """One way to cut the work."""

    name: str
    max_num_seqs: int = 64
    budget: int = 2048
    blocks: int = 4096
    prefix_caching: bool = False
    overlap: bool = False


ALONE = Way("alone", max_num_seqs=1)
WAYS = (
    Way("64 at once"),
    Way("prompts in chunks of at most 7", max_num_seqs=4, budget=7),
    Way("preempted", blocks=48),
    Way("prefix cache", prefix_caching=True),
    Way("overlapped", overlap=True),
    Way("all of these", budget=40, blocks=48, prefix_caching=True, overlap=True),
)


def engine_for(way: Way, runner: ModelRunner) -> Engine:
    config = EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=way.max_num_seqs, overlap=way.overlap)
    dtype, longest = runner.kv_cache.dtype, runner.max_model_len
    fresh = ModelRunner(runner.shape, runner.model, runner.parallel, config, longest, dtype, runner.device, way.blocks)
    blocks = BlockManager(way.blocks, BLOCK_SIZE, way.prefix_caching)
    return Engine(fresh, Scheduler(blocks, way.max_num_seqs, way.budget, longest), frozenset(), way.overlap)


def complete(engine: Engine, requests: list[Request]) -> tuple[list[Row], int]:
    """Every request's tokens and log-probabilities, and how often one was preempted."""
    rows: dict[int, Row] = {request.request_id: ([], []) for request in requests}
    preempted = 0
    for request in requests:
        engine.add(request)
    while engine.has_work():
        outputs, stats = engine.step()
        preempted += stats.preempted
        for output in outputs:
            token_ids, logprobs = rows[output.request_id]
            token_ids += output.token_ids
            logprobs += [told.logprob for told in output.logprobs or ()]
    return [rows[request.request_id] for request in requests], preempted


def by_transformers(requests: list[Request], dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Greedy completions by the Hugging Face library, one at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=dtype, attn_implementation="sdpa").to(device)
    rows = []
    for request in requests:
        prompt = torch.tensor([request.prompt_token_ids], device=device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.sampling.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        drawn = out.sequences[0, prompt.shape[1] :]
        wide = torch.cat(out.logits).to(torch.float64 if dtype == torch.float64 else torch.float32)
        rows.append((drawn.tolist(), wide.log_softmax(-1).gather(1, drawn.unsqueeze(1)).squeeze(1).tolist()))
    return rows


def compare(rows: list[Row], alone: list[Row]) -> tuple[int, float]:
    """How many rows differ, and the largest difference of a log-probability before they do."""
    differing, largest = 0, 0.0
    for (tokens, logprobs), (expected, expected_logprobs) in zip(rows, alone, strict=True):
        pairs = zip(tokens, expected, strict=True)
        same = next((i for i, (token, other) in enumerate(pairs) if token != other), len(tokens))
        differing += same < len(tokens)
        gaps = (abs(a - b) for a, b in zip(logprobs[:same], expected_logprobs[:same], strict=True))
        largest = max(largest, *gaps, 0.0)
    return differing, largest


def requests_for(count: int, **sampling: float) -> list[Request]:
    """Two requests for each of the shipped prompts, the second with the first one's prompt behind its own: ragged lengths."""
    tokenizer = Tokenizer.load(TINY / "model")
    shards = sorted((TINY / "sample").glob("*.parquet"))
    prompts = [text for shard in shards for text in pq.read_table(shard)["prompt"].to_pylist() if text]
    texts = [prompts[i % len(prompts)] + (" " + prompts[i // 2 % len(prompts)] if i % 2 else "") for i in range(count)]
    params = SamplingParams(max_tokens=64, ignore_eos=True, logprobs=0, **sampling)  # type: ignore[arg-type]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=True)
    return [Request(i, token_ids, params, seed=i) for i, token_ids in enumerate(encoded)]


def table(dtype: str, device: torch.device, count: int) -> Iterator[tuple[str, ...]]:
    config = Config(model=ModelConfig(path=str(TINY / "model"), dtype=dtype), engine=EngineConfig(max_num_seqs=1))
    runner = build_runner(config, load_shape(config.model), TensorParallel(), device)
    for kind, sampling in (("greedy", {}), ("temperature 0.8", {"temperature": 0.8, "top_p": 0.95})):
        requests = requests_for(count, **sampling)
        alone, _ = complete(engine_for(ALONE, runner), requests)
        for way in WAYS:
            rows, preempted = complete(engine_for(way, runner), requests)
            name = f"{way.name} ({preempted:,} times)" if preempted else way.name
            yield dtype, kind, name, *_figures(rows, alone)
        if kind == "greedy":
            yield dtype, kind, "transformers", *_figures(by_transformers(requests, runner.kv_cache.dtype, device), alone)


def _figures(rows: list[Row], alone: list[Row]) -> tuple[str, str]:
    differing, largest = compare(rows, alone)
    return f"{differing} of {len(rows)}", f"{largest:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--dtypes", default="float64,float32,bfloat16")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| arithmetic | tokens | cut | rows that differ | largest difference of a log-probability |\n|---|---|---|---|---|")
    for dtype in args.dtypes.split(","):
        for line in table(dtype, device, args.rows):
            print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
