"""How large the KV cache becomes, and what is said when it would be too small."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from batchinfer.config import ConfigError, EngineConfig
from batchinfer.engine import kv_memory, model_runner
from batchinfer.engine.engine import build_engine
from batchinfer.engine.kv_memory import largest_batch
from batchinfer.engine.model_runner import build_runner
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, MAX_MODEL_LEN, config_for


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


def test_a_small_model_gets_what_its_limits_can_use(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_for(checkpoint, max_num_seqs=5)
    with caplog.at_level(logging.INFO):
        engine = build_engine(config, load_shape(config.model), TensorParallel(), CPU)
    assert engine.scheduler.blocks.num_blocks == 5 * MAX_MODEL_LEN // 4
    assert engine.max_model_len == MAX_MODEL_LEN
    assert set(engine.runner.phases) == {"load", "kv"}  # type: ignore[attr-defined]
    assert [record.message.split()[0] for record in caplog.records if record.name == model_runner.__name__] == ["loaded", "KV"]


def test_dtype_auto_is_float32_on_a_cpu(checkpoint: Path) -> None:
    config = config_for(checkpoint, dtype="auto")
    runner = build_runner(config, load_shape(config.model), TensorParallel(), CPU)
    assert runner.kv_cache.dtype == torch.float32
    assert next(runner.model.parameters()).dtype == torch.float32


def test_the_cache_is_a_share_of_free_memory_for_each_process(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(checkpoint, max_num_seqs=64)
    config = dataclasses.replace(config, hw=dataclasses.replace(config.hw, gpus_per_node=2))
    shape = load_shape(config.model)
    block_bytes = 4 * shape.kv_bytes_per_token("float64")
    monkeypatch.setattr(kv_memory, "available_memory", lambda: 600 * block_bytes)
    assert build_runner(config, shape, TensorParallel(), CPU).num_blocks == 100
    monkeypatch.setattr(kv_memory, "available_memory", lambda: 60 * block_bytes)
    with pytest.raises(ConfigError, match=r"model.max_model_len=96 needs .* hw.tensor_parallel or engine.gpu_memory_utilization"):
        build_runner(config, shape, TensorParallel(), CPU)


@pytest.mark.parametrize(("seqs", "budget"), [(4, 64), (8, 8), (64, 8), (1, 500), (3, 500)])
def test_the_largest_batch_fills_the_budget_and_runs_over_one_block(checkpoint: Path, seqs: int, budget: int) -> None:
    batch = largest_batch(EngineConfig(block_size=4, max_num_seqs=seqs, max_num_batched_tokens=budget), MAX_MODEL_LEN)
    assert batch.num_tokens == min(budget, seqs * MAX_MODEL_LEN)
    assert batch.num_samples == min(seqs, budget)
    assert batch.positions.min() >= 0 and batch.positions.max() == MAX_MODEL_LEN - 1
    config = config_for(checkpoint)
    runner = build_runner(config, load_shape(config.model), TensorParallel(), CPU)
    before = runner.kv_cache.clone()
    assert len(runner.execute(batch).token_ids) == batch.num_samples
    assert torch.equal(runner.kv_cache, before)
