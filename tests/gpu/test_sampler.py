"""The sampler on a GPU: it never waits for the device, whatever a batch's rows ask for, and draws what it draws on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchinfer.engine.batch import Batch, BatchBuilder
from batchinfer.engine.sampler import SampledTokens, TokenMask, sample_tokens
from batchinfer.engine.scheduler import ScheduledBatch
from batchinfer.engine.sequence import Request, SamplingParams, Sequence

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

VOCAB, BLOCK_SIZE, TOKENS = 3000, 4, 9
ASKED = {
    "greedy": SamplingParams(),
    "plain": SamplingParams(temperature=0.8),
    "top-k": SamplingParams(temperature=0.8, top_k=20),
    "top-p": SamplingParams(temperature=1.2, top_p=0.9),
    "min-p": SamplingParams(temperature=1.2, min_p=0.05),
    "penalties": SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "min_tokens": SamplingParams(min_tokens=99, stop_token_ids=(1, 5)),
    "logprobs": SamplingParams(temperature=0.5, logprobs=5),
    "all": SamplingParams(0.7, top_p=0.8, top_k=50, min_p=0.01, repetition_penalty=1.1, logprobs=3, min_tokens=99),
}


def batch_of(asked: list[SamplingParams]) -> tuple[Batch, torch.Tensor]:
    """Each row draws behind TOKENS tokens of its own. With the token cache."""
    width = TOKENS // BLOCK_SIZE + 1
    builder = BatchBuilder(len(asked), width, BLOCK_SIZE, frozenset({2}))
    sequences = []
    for i, params in enumerate(asked):
        prompt = [(7 * i + 3 * j) % VOCAB for j in range(TOKENS)]
        sequences.append(Sequence.from_request(Request(i, prompt, params, 1000 + i), 0.0, 1000))
        sequences[-1].block_table = list(range(i * width, (i + 1) * width))
    batch = builder.build(ScheduledBatch(sequences, [TOKENS] * len(asked)))
    cache = torch.zeros(len(asked) * width * BLOCK_SIZE, dtype=torch.int32)
    cache[torch.from_numpy(batch.slot_mapping)] = torch.from_numpy(batch.token_ids)
    return batch, cache.view(-1, BLOCK_SIZE)


def drawn(asked: list[SamplingParams], device: str, masked: bool) -> SampledTokens:
    batch, cache = batch_of(asked)
    logits = 2 * torch.randn(len(asked), VOCAB, generator=torch.Generator().manual_seed(len(asked)))
    mask = TokenMask(np.arange(0, len(asked), 2), np.full((len(asked[::2]), 70), 0x5A5A5A5A, dtype=np.int32)) if masked else None
    logits, cache, step = logits.to(device), cache.to(device), batch.to_tensors(torch.device(device))
    if device == "cpu":
        return sample_tokens(logits, batch, step, cache, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return sample_tokens(logits, batch, step, cache, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("kinds", [[kind] for kind in ASKED] + [list(ASKED)], ids="-".join)
def test_it_never_waits_and_draws_the_tokens_of_the_cpu(kinds: list[str], masked: bool) -> None:
    asked = [ASKED[kind] for kind in kinds for _ in range(3)]
    gpu, cpu = drawn(asked, "cuda", masked), drawn(asked, "cpu", masked)
    assert gpu.token_ids.tolist() == cpu.token_ids.tolist() and not gpu.broken.any()
    if cpu.logprobs is not None:
        assert gpu.logprobs is not None
        assert gpu.logprobs.top_ids.tolist() == cpu.logprobs.top_ids.tolist()
        torch.testing.assert_close(gpu.logprobs.top.cpu(), cpu.logprobs.top, rtol=1e-5, atol=1e-5)
