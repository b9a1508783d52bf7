"""Our model against transformers, exact in float64."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import save_checkpoint
from tests.model.oracle import greedy, load, widen
from tests.model.variants import VARIANTS

PROMPTS = [[1, 5, 9, 44, 90, 3, 17, 8, 8, 21, 60, 33, 2, 71], [1], [1, 96, 95, 94, 93]]


@pytest.fixture(params=VARIANTS)
def checkpoint(request, tmp_path):
    changes = VARIANTS[request.param]
    return tmp_path, widen(save_checkpoint(tmp_path, **changes))


def test_logits_and_greedy_tokens_are_those_of_transformers(checkpoint):
    folder, theirs = checkpoint
    for prompt, logits in zip(PROMPTS, load(folder).step(dict(enumerate(PROMPTS))), strict=True):
        expected = theirs(torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    for prompt, drawn in zip(PROMPTS, greedy(load(folder), PROMPTS, 30), strict=True):
        whole = torch.tensor([prompt + drawn])
        with torch.no_grad():
            expected = theirs(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert drawn == expected.tolist()


def test_chunked_prefill_and_padding_change_nothing(checkpoint):
    folder, _ = checkpoint
    (whole,) = load(folder).step({0: PROMPTS[0]})
    paged = load(folder)
    first = paged.step({0: PROMPTS[0][:4], 1: PROMPTS[2]}, padding=3)[0]
    second = paged.step({1: [4], 0: PROMPTS[0][4:11]})[1]
    third = paged.step({0: PROMPTS[0][11:]}, padding=1)[0]
    torch.testing.assert_close(torch.cat((first, second, third)), whole, rtol=0, atol=1e-10)


def test_float32_stays_near(tmp_path):
    theirs = widen(save_checkpoint(tmp_path))
    (logits,) = load(tmp_path, dtype=torch.float32).step({0: PROMPTS[0]})
    expected = theirs(torch.tensor([PROMPTS[0]])).logits[0]
    assert (logits - expected).abs().max() < 1e-4


def test_dynamic_rope_beyond_the_trained_length_is_what_transformers_generates(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
    theirs = save_checkpoint(tmp_path, max_position_embeddings=16, rope_parameters=rope)
    theirs.generation_config.eos_token_id = None
    for prompt, drawn in zip(PROMPTS, greedy(load(tmp_path), PROMPTS, 40), strict=True):
        settings = {"do_sample": False, "max_new_tokens": 40, "output_logits": True, "return_dict_in_generate": True}
        generated = theirs.generate(torch.tensor([prompt]), **settings)
        assert drawn == generated.sequences[0, len(prompt) :].tolist()
        (ours,) = load(tmp_path).step({0: prompt + drawn})
        step_by_step = torch.cat(generated.logits).double()
        torch.testing.assert_close(ours[len(prompt) - 1 : -1], step_by_step, rtol=0, atol=1e-4)  # their angles are float32
        in_one_piece = theirs(torch.tensor([prompt + drawn]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert (in_one_piece - step_by_step).abs().max() > 0.01  # there transformers does not agree with itself
