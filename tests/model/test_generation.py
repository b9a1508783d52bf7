"""The engine over every kind of model generates what transformers generates, to the ends that generation_config.json names."""

from __future__ import annotations

import json

import pytest
import torch

from batchinfer.engine.model_runner import build_runner
from batchinfer.engine.sequence import Request, SamplingParams
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint
from tests.engine.engines import CPU, complete, config_for, engine_with
from tests.model.oracle import widen
from tests.model.variants import VARIANTS

PROMPTS = [[1, 5, 9, 44, 90, 3, 17, 8, 8, 21, 60, 33, 2, 71], [1], [1, 96, 95, 94, 93], [40, 41, 42] * 8]
NUM_TOKENS = 16


def generate(theirs, prompt):
    tokens = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_TOKENS)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_completions_are_those_of_transformers(tmp_path, name):
    theirs = widen(save_checkpoint(tmp_path, **VARIANTS[name]))
    theirs.generation_config.eos_token_id = None
    ends = [generate(theirs, PROMPTS[0])[5], generate(theirs, PROMPTS[2])[9]]
    theirs.generation_config.eos_token_id = ends
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    expected = [generate(theirs, prompt) for prompt in PROMPTS]
    assert len(expected[0]) <= 6
    config = config_for(tmp_path)
    runner = build_runner(config, load_shape(config.model), TensorParallel(), CPU)
    requests = [Request(i, prompt, SamplingParams(max_tokens=NUM_TOKENS), seed=0) for i, prompt in enumerate(PROMPTS)]
    completions, _ = complete(engine_with(runner, num_blocks=11, budget=7), requests)  # chunked, and short of blocks
    assert completions == dict(enumerate(expected))
