"""Two and four ranks over gloo compute what one rank computes, exactly in float64."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from batchinfer.config import ConfigError, ModelConfig
from batchinfer.model.config import ModelShape, load_shape
from batchinfer.model.decoder import Decoder
from batchinfer.model.layers import VocabParallel
from batchinfer.model.loader import load_weights
from batchinfer.model.parallel import TensorParallel, init_distributed
from tests.checkpoints import save_checkpoint
from tests.model.oracle import load
from tests.model.variants import VARIANTS

PROMPTS = {0: [1, 5, 9, 44, 96, 0, 17, 8], 1: [3, 2], 2: [48, 49, 50]}
CPU = torch.device("cpu")


def _rank(rank: int, size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    parallel = init_distributed(CPU)
    paged = load(folder, parallel)
    first = paged.step(PROMPTS)
    second = paged.step({2: [7], 0: [96, 1, 2]})
    torch.save(torch.cat(first + second), folder / f"logits{rank}.pt")
    parallel.close()


def _run(size: int, folder: Path) -> list[torch.Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (size, port, folder), nprocs=size)
    return [torch.load(folder / f"logits{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"vocab_size": 97}),  # odd vocabulary
        (2, {"num_key_value_heads": 1, "tie_word_embeddings": True}),  # the KV head is replicated
        (4, {"num_key_value_heads": 2, "vocab_size": 101, "family": "Mistral", "sliding_window": 5}),
        (2, {"attention_bias": True, "mlp_bias": True}),  # of row-parallel layers too: they count once
        (2, {"family": "Qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        (4, {"family": "Qwen3", "head_dim": 12, "attention_bias": True}),  # replicated KV heads with biases and norms
    ],
)
def test_ranks_together_equal_one_rank(tmp_path, size, changes):
    save_checkpoint(tmp_path, **changes)
    paged = load(tmp_path)
    expected = torch.cat(paged.step(PROMPTS) + paged.step({2: [7], 0: [96, 1, 2]}))
    for logits in _run(size, tmp_path):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_one_rank_has_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parallel = init_distributed(CPU)
    assert parallel == TensorParallel(rank=0, size=1)
    assert not torch.distributed.is_initialized()


SHAPE = ModelShape(
    "LlamaForCausalLM", vocab_size=5, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=2
)
WITH_ALL = replace(SHAPE, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)


@pytest.mark.parametrize(("size", "word"), [(3, "attention heads"), (8, "attention heads")])
def test_sizes_that_do_not_divide_are_refused(size, word):
    with pytest.raises(ConfigError, match=f"hw.tensor_parallel={size} does not divide .* {word}"):
        Decoder(SHAPE, TensorParallel(0, size), torch.float32, CPU, 16)


def test_short_vocabulary_leaves_the_last_rank_without_rows():
    parts = [VocabParallel("w", SHAPE, TensorParallel(rank, 4), torch.float32, CPU) for rank in range(4)]
    assert [(part.start, part.stop, len(part.weight)) for part in parts] == [(0, 2, 2), (2, 4, 2), (4, 5, 2), (5, 5, 2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_built_model_has_the_parameters_that_its_shape_counts(tmp_path, name):
    save_checkpoint(tmp_path, **VARIANTS[name])
    shape = load_shape(ModelConfig(path=str(tmp_path)))
    for size in (1, 2, 4):
        model = Decoder(shape, TensorParallel(size - 1, size), torch.float32, CPU, 16)
        assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters(size)


def test_random_weights_of_ranks_are_slices_of_the_whole():
    config = ModelConfig(load_format="random")

    def weights(parallel: TensorParallel) -> dict[str, torch.Tensor]:
        model = Decoder(WITH_ALL, parallel, torch.float32, CPU, 16)
        load_weights(model, WITH_ALL, config, seed=3, device=CPU)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole, left, right = weights(TensorParallel()), weights(TensorParallel(0, 2)), weights(TensorParallel(1, 2))
    for name, value in whole.items():
        assert value.std() > 0
        row_parallel = "down_proj" in name or "o_proj" in name
        if "norm" in name or (row_parallel and "bias" in name):
            assert torch.equal(left[name], value) and torch.equal(right[name], value)
            assert (value.mean() > 0.9) == ("norm" in name)
        elif row_parallel:
            assert torch.equal(torch.cat((left[name], right[name]), dim=1), value)
        elif "gate_up" in name:
            gates, ups = zip(left[name].chunk(2), right[name].chunk(2), strict=True)
            assert torch.equal(torch.cat(gates + ups), value)
        elif "embed" in name or "lm_head" in name:
            assert torch.equal(torch.cat((left[name], right[name]))[:5], value)
        else:
            assert "qkv_proj" in name
            heads = zip(left[name].split((4, 2, 2)), right[name].split((4, 2, 2)), strict=True)
            assert torch.equal(torch.cat([torch.cat(parts) for parts in heads]), value)
