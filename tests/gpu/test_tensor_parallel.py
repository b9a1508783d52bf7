"""Several GPUs give what one gives: the same tokens in float32, and log-probabilities as near to exact ones in bfloat16.

Summed through each other's memory, and by NCCL; kernel by kernel, in CUDA graphs, and in pieces beside the products.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchinfer.config import Config, EngineConfig, ModelConfig
from batchinfer.engine.engine import build_engine, serve
from batchinfer.engine.model_runner import build_runner
from batchinfer.engine.sequence import Request
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.told import Told, run
from tests.gpu.ranks import run_ranks, sizes
from tests.gpu.test_nearness import VOCAB, distance, engine_of, requests

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not sizes(), reason="fewer than two CUDA GPUs")]

SHAPE = {
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "vocab_size": VOCAB + 1,
}
WAYS: list[dict[str, object]] = [
    {"check_ranks": True},
    {"peer_memory": False, "check_ranks": True},
    {"peer_memory": False, "max_num_batched_tokens": 2048},
    {"cuda_graphs": False, "overlap": False, "max_num_batched_tokens": 2048},
]


def answer_on_rank(
    parallel: TensorParallel,
    device: torch.device,
    folder: Path,
    answer: Path,
    dtype: str,
    engine: dict[str, object],
    asked: list[Request],
) -> None:
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 300, "gpu_memory_utilization": 0.2, **engine}
    config = Config(model=ModelConfig(path=str(folder), dtype=dtype), engine=EngineConfig(**limits))  # type: ignore[arg-type]
    shape = load_shape(config.model)
    if parallel.rank > 0:
        serve(build_runner(config, shape, parallel, device))
        return
    built = build_engine(config, shape, parallel, device)
    told = run(built, asked)
    graphs = built.runner.graphs is not None  # type: ignore[attr-defined]
    connected = built.runner.parallel.peers is not None  # type: ignore[attr-defined]
    built.close()
    torch.save((told, graphs, connected), answer)


def answer_of(size: int, folder: Path, dtype: str, asked: list[Request], **engine: object) -> tuple[list[Told], bool, bool]:
    answer = folder / "answer.pt"
    run_ranks(size, answer_on_rank, folder, answer, dtype, engine, asked)
    told, graphs, connected = torch.load(answer, weights_only=False)
    return told, graphs, connected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    changes = {"family": "Llama", "max_position_embeddings": 2048}
    save_checkpoint(tmp_path, dtype=torch.bfloat16, **{**changes, **SHAPE})
    return tmp_path


@pytest.mark.parametrize("size", sizes())
@pytest.mark.parametrize("peer_memory", [True, False])
def test_tokens_are_those_of_one_gpu(folder: Path, size: int, peer_memory: bool) -> None:
    asked = requests()
    one = run(engine_of(folder, "float32"), asked)
    several, _, connected = answer_of(size, folder, "float32", asked, peer_memory=peer_memory)
    assert connected == peer_memory
    assert sum(a.token_ids != b.token_ids for a, b in zip(one, several, strict=True)) <= 2, "more than near-ties explain"


@pytest.mark.parametrize("size", sizes())
@pytest.mark.parametrize("engine", WAYS)
def test_log_probabilities_are_as_near_as_those_of_one_gpu(folder: Path, size: int, engine: dict[str, object]) -> None:
    asked = requests()
    by_one = distance(folder, asked, run(engine_of(folder, "bfloat16"), asked))
    told, graphs, connected = answer_of(size, folder, "bfloat16", asked, **engine)
    assert graphs == engine.get("cuda_graphs", True) and connected == engine.get("peer_memory", True)
    by_several = distance(folder, asked, told)
    print(f"{size} ranks, {engine}: {by_several:.4f}, one {by_one:.4f}")
    assert by_several < 1.2 * by_one
