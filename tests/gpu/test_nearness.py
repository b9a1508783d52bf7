"""The engine by kernels, in bfloat16: its log-probabilities are as near to the exact ones as those of plain torch in bfloat16.

Whatever comes out is scored again by the reference in float32, so no near-tie matters. The work mixes chunks, decode rows in
CUDA graphs, shared beginnings and preempted rows.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from batchinfer import ops
from batchinfer.config import Config, EngineConfig, ModelConfig
from batchinfer.engine.engine import Engine, build_engine
from batchinfer.engine.sequence import Request, SamplingParams
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.told import Told, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

VOCAB = 1000
SHAPES = {
    "heads of 128": {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped heads of 64": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2},
    "grouped heads of 128": {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 1},
    "window of 100": {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "family": "Mistral",
        "sliding_window": 100,
    },
}


def engine_of(folder: Path, dtype: str, **engine: object) -> Engine:
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 300, "gpu_memory_utilization": 0.2, **engine}
    config = Config(model=ModelConfig(path=str(folder), dtype=dtype), engine=EngineConfig(**limits))  # type: ignore[arg-type]
    return build_engine(config, load_shape(config.model), TensorParallel(), torch.device("cuda"))


def requests() -> list[Request]:
    """Ragged prompts, of which some begin alike, and some of those again."""
    rng = random.Random(3)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10, VOCAB) for _ in range(count)]

    system, example = tokens(230), tokens(170)
    prompts = [tokens(rng.randint(1, 700)) for _ in range(20)]
    prompts += [system + tokens(rng.randint(1, 90)) for _ in range(24)]
    prompts += [system + example + tokens(rng.randint(1, 90)) for _ in range(20)]
    rng.shuffle(prompts)
    sampling = [SamplingParams(max_tokens=rng.randint(2, 40), ignore_eos=True, logprobs=0) for _ in prompts]
    return [Request(i, prompt, sampling[i], 0) for i, prompt in enumerate(prompts)]


def exact_logprobs(folder: Path, asked: list[Request], told: list[Told]) -> list[float]:
    """Of every generated token, scored by plain torch in float32."""
    exact = engine_of(folder, "float32", attention_backend="reference")
    scoring = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    texts = [Request(r.request_id, r.prompt_token_ids + t.token_ids, scoring, 0) for r, t in zip(asked, told, strict=True)]
    found = []
    for request, scored in zip(asked, run(exact, texts), strict=True):
        assert scored.prompt is not None
        found += [entry.logprob for entry in scored.prompt[len(request.prompt_token_ids) :] if entry is not None]
    return found


def own_logprobs(told: list[Told]) -> list[float]:
    return [entry.logprob for t in told for entry in t.logprobs or []]


def root_mean_square(a: list[float], b: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(np.subtract(a, b)))))


def distance(folder: Path, asked: list[Request], told: list[Told]) -> float:
    return root_mean_square(own_logprobs(told), exact_logprobs(folder, asked, told))


def by_transformers(folder: Path, attention: str, asked: list[Request], told: list[Told]) -> list[float]:
    """Of every generated token, scored by transformers in bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention).cuda()
    found = []
    for request, ours in zip(asked, told, strict=True):
        text = torch.tensor([request.prompt_token_ids + ours.token_ids], device="cuda")
        with torch.inference_mode():
            scores = model(text).logits[0, len(request.prompt_token_ids) - 1 : -1].float().log_softmax(-1)
        found += scores.gather(1, text[0, len(request.prompt_token_ids) :, None]).flatten().tolist()
    return found


@pytest.fixture(params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    changes = {"family": "Llama", "vocab_size": VOCAB, "intermediate_size": 768, "max_position_embeddings": 2048}
    save_checkpoint(tmp_path, dtype=torch.bfloat16, **{**changes, **SHAPES[request.param]})
    return tmp_path


def test_kernels_are_as_near_as_plain_torch(folder: Path) -> None:
    asked = requests()
    by_torch = distance(folder, asked, run(engine_of(folder, "bfloat16", attention_backend="reference"), asked))
    ways: dict[str, dict[str, object]] = {
        "graphs": {},
        "in turn, kernel by kernel": {"overlap": False, "cuda_graphs": False, "prefix_caching": False},
        "few rows and small chunks": {"max_num_seqs": 5, "max_num_batched_tokens": 64},
    }
    for way, limits in ways.items():
        engine = engine_of(folder, "bfloat16", **limits)
        assert ops.attention_takes(engine.runner.kv_caches[0][0], 1), "the kernels do not attend"  # type: ignore[attr-defined]
        ours = distance(folder, asked, run(engine, asked))
        print(f"{way}: {ours:.4f}, by torch {by_torch:.4f}")
        assert ours < 1.3 * by_torch, way


def test_kernels_are_within_the_spread_of_transformers(folder: Path) -> None:
    asked = requests()
    told = run(engine_of(folder, "bfloat16"), asked)
    exact, ours = exact_logprobs(folder, asked, told), own_logprobs(told)
    eager, sdpa = (by_transformers(folder, attention, asked, told) for attention in ("eager", "sdpa"))
    spread = root_mean_square(eager, sdpa)
    theirs = max(root_mean_square(eager, exact), root_mean_square(sdpa, exact))
    print(
        f"from exact: ours {root_mean_square(ours, exact):.4f}, transformers {theirs:.4f}; eager from sdpa {spread:.4f}; ", end=""
    )
    print(f"ours from eager {root_mean_square(ours, eager):.4f}, from sdpa {root_mean_square(ours, sdpa):.4f}")
    assert root_mean_square(ours, exact) < 1.1 * theirs
    assert min(root_mean_square(ours, eager), root_mean_square(ours, sdpa)) < 1.5 * spread
