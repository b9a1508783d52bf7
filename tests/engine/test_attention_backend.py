"""Backends of attention say the same through the whole engine: chunks, decode rows, shared prefixes, preemption, a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchinfer import ops
from batchinfer.engine.model_runner import build_runner
from batchinfer.engine.sequence import Request
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, engine_with, make_requests


@pytest.fixture(autouse=True)
def own_backend() -> Iterator[None]:
    yield
    ops.choose_backend("auto", CPU)


@pytest.mark.parametrize("changes", [{}, {"family": "Mistral", "sliding_window": 7}])
def test_scores_in_memory_give_the_tokens_of_the_reference(tmp_path: Path, changes: dict[str, object]) -> None:
    save_checkpoint(tmp_path, **changes)  # type: ignore[arg-type]
    requests = [Request(r.request_id, [3] * 9 + r.prompt_token_ids, r.sampling, r.seed) for r in make_requests(10, 97)]
    found = []
    for backend in ("reference", "fused_softmax"):
        config = config_for(tmp_path)
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, attention_backend=backend))
        runner = build_runner(config, load_shape(config.model), TensorParallel(), CPU)
        found.append(complete(engine_with(runner, num_blocks=30, prefix_caching=True), requests))
    assert found[0] == found[1] and found[0][1] > 0
