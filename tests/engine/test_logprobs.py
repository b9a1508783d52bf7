"""Log-probabilities of prompts equal transformers', however few positions are projected at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchinfer.engine import logprobs
from batchinfer.engine.logprobs import prompt_log_probabilities
from tests.checkpoints import random_model


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


@pytest.mark.parametrize("chunk_rows", [1000, 7, 1])
def test_prompts_equal_transformers(monkeypatch: pytest.MonkeyPatch, model: Any, chunk_rows: int) -> None:
    """A prompt behind 4 tokens of something else in the same step."""
    vocab_size, sizes = model.config.vocab_size, []
    prompt = torch.randint(0, vocab_size, (23,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(prompt[None], output_hidden_states=True)

    def project(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        with torch.inference_mode():
            logits: torch.Tensor = model.lm_head(hidden)
        return logits

    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk_rows * vocab_size + 1)
    hidden = torch.cat((torch.zeros(4, model.config.hidden_size, dtype=torch.float64), output.hidden_states[-1][0]))
    rows = torch.arange(22, dtype=torch.int32) + 4
    found = prompt_log_probabilities(project, hidden, rows, prompt[1:].int(), 5, vocab_size)
    expected = output.logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(found.chosen, expected.gather(1, prompt[1:, None])[:, 0], rtol=0, atol=1e-9)
    values, ids = expected.topk(5)
    torch.testing.assert_close(found.top, values, rtol=0, atol=1e-9)
    assert torch.equal(found.top_ids, ids)
    assert torch.equal(found.ranks, 1 + (expected > found.chosen[:, None] + 1e-12).sum(-1))
    assert sizes == [min(chunk_rows, 22 - i) for i in range(0, 22, chunk_rows)]
