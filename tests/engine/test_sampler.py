"""What may be drawn from a batch's logits, against a plain twin that looks at each row's own parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer import ops
from batchinfer.engine.batch import Batch, BatchBuilder
from batchinfer.engine.sampler import SampledTokens, TokenMask, sample_tokens
from batchinfer.engine.scheduler import ScheduledBatch
from batchinfer.engine.sequence import Request, SamplingParams, Sequence
from tests.engine.plain_sampling import SamplingRow, plain_logprobs, plain_sample

CPU = torch.device("cpu")
EOS = frozenset({2})
BLOCK_SIZE = 4
VOCAB = 70


def batch_of(rows: list[SamplingRow]) -> tuple[Batch, torch.Tensor]:
    """The batch in which every row recomputes all of its tokens and draws the next one, and the token cache behind it."""
    width = max(len(row.prompt + row.completion) for row in rows) // BLOCK_SIZE + 1
    builder = BatchBuilder(len(rows), width, BLOCK_SIZE, EOS)
    sequences = [Sequence.from_request(Request(i, row.prompt, row.params, row.seed), 0.0, 1000) for i, row in enumerate(rows)]
    for i, (seq, row) in enumerate(zip(sequences, rows, strict=True)):
        seq.token_ids += row.completion
        seq.block_table = [i * width + j for j in range(-(-seq.num_tokens // BLOCK_SIZE))]
    batch = builder.build(ScheduledBatch(sequences, [seq.num_tokens for seq in sequences]))
    cache = torch.full((len(rows) * width * BLOCK_SIZE,), 1, dtype=torch.int32)
    cache[torch.from_numpy(batch.slot_mapping)] = torch.from_numpy(batch.token_ids)
    return batch, cache.view(-1, BLOCK_SIZE)


def mask_of(rows: list[SamplingRow], width: int) -> TokenMask | None:
    """The rows' allowed tokens, packed; `width` words."""
    masked = [i for i, row in enumerate(rows) if row.allowed is not None]
    bits = np.zeros((len(masked), width * 32), dtype=np.uint8)
    for line, i in zip(bits, masked, strict=True):
        line[[*rows[i].allowed]] = 1  # type: ignore[misc]  # only masked rows are here
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    return TokenMask(np.array(masked), packed) if masked else None


def sample_rows(logits: torch.Tensor, rows: list[SamplingRow]) -> SampledTokens:
    batch, token_cache = batch_of(rows)
    mask = mask_of(rows, 1 + max([0, *(token for row in rows for token in row.allowed or ())]) // 32)
    return sample_tokens(logits.clone(), batch, batch.to_tensors(CPU), token_cache, mask)


def draw(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return sample_rows(logits, rows).token_ids.tolist()


def _maybe(value: object, strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.just(value) | strategy


TOKENS = st.integers(0, VOCAB - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=_maybe(0.0, st.floats(1e-3, 3.0)),
    top_p=_maybe(1.0, st.floats(1e-6, 0.999)),
    top_k=_maybe(0, st.integers(1, VOCAB + 5)),
    min_p=_maybe(0.0, st.floats(0.001, 1.0)),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(st.integers(0, VOCAB + 9), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    repetition_penalty=_maybe(1.0, st.floats(0.3, 3.0)),
    presence_penalty=_maybe(0.0, st.floats(-2.0, 2.0)),
    frequency_penalty=_maybe(0.0, st.floats(-2.0, 2.0)),
    logprobs=_maybe(None, st.integers(0, 6)),
)
ROWS = st.builds(
    SamplingRow,
    PARAMS,
    st.integers(0, 2**64 - 1),
    st.lists(TOKENS, min_size=1, max_size=9),
    st.lists(TOKENS, max_size=6),
    _maybe(None, st.frozensets(TOKENS, min_size=1, max_size=30) | st.just(EOS)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(ROWS, min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_a_batch_equals_its_plain_twin_and_each_row_alone(rows: list[SamplingRow], noise: int) -> None:
    logits = torch.randn(len(rows), VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(noise)) * 2
    logits[:, 2] += 3.0  # the end wants to come
    together = sample_rows(logits, rows)
    tokens = together.token_ids.tolist()
    assert tokens == [plain_sample(line, row, EOS) for line, row in zip(logits.tolist(), rows, strict=True)]
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    assert (together.logprobs is None) == (not asking)
    for place, i in enumerate(asking):
        assert together.logprobs is not None
        chosen, rank, top_ids, top = (tensor[place].tolist() for tensor in together.logprobs)
        expected = plain_logprobs(logits[i].tolist(), tokens[i], rows[i].params.logprobs or 0)
        found = list(zip(top_ids, top, strict=True))[: rows[i].params.logprobs]
        assert (rank, [token for token, _ in found]) == (expected.rank, [token for token, _ in expected.top])
        assert [chosen, *(p for _, p in found)] == pytest.approx([expected.logprob, *(p for _, p in expected.top)], abs=1e-11)
    for dtype in (torch.float64, torch.float32):
        everything = sample_rows(logits.to(dtype), rows)
        for i, row in enumerate(rows):
            alone = sample_rows(logits[i : i + 1].to(dtype), [row])
            assert alone.token_ids.tolist() == [int(everything.token_ids[i])]
            if alone.logprobs is not None and everything.logprobs is not None:
                assert torch.equal(alone.logprobs.chosen[0], everything.logprobs.chosen[asking.index(i)])


def row_of(params: SamplingParams, prompt: int = 1, **rest: object) -> SamplingRow:
    return SamplingRow(params, 0, [0] * prompt, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(("min_tokens", "ignore_eos", "expected"), [(0, False, 2), (1, False, 0), (1, True, 2)])
def test_the_end_waits_for_min_tokens(min_tokens: int, ignore_eos: bool, expected: int) -> None:
    """EOS (2) is the likeliest token and 1, a stop token id, the next one."""
    params = SamplingParams(min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=(1, 99))
    assert draw(torch.tensor([[0.0, 1.0, 2.0]]), [row_of(params)]) == [expected]


def test_structured_output_that_can_only_end_ends() -> None:
    """Before min_tokens the end stays away from a masked row while something else is allowed, and only then."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    waiting = SamplingParams(min_tokens=1)
    rows = [row_of(waiting, allowed=frozenset({0, 2})), row_of(waiting, allowed=EOS), row_of(waiting)]
    assert draw(logits, rows) == [0, 2, 1]


def test_masks_of_a_caller_are_left_as_they_are() -> None:
    rows = [row_of(SamplingParams(min_tokens=1), allowed=frozenset({0, 2}))]
    batch, token_cache = batch_of(rows)
    mask = mask_of(rows, 1)
    assert mask is not None
    sample_tokens(torch.zeros(1, 3), batch, batch.to_tensors(CPU), token_cache, mask)
    assert mask.bitmask.tolist() == [[0b101]]


def test_penalties_see_prompt_and_completion_as_they_should() -> None:
    """Token 0 is the prompt's, token 1 was generated: repetition takes both back, presence the generated one alone."""
    logits = torch.tensor([[4.0, 3.9, 3.0, 0.0]])

    def drawn(**penalties: float) -> list[int]:
        return draw(logits, [row_of(SamplingParams(**penalties), completion=[1])])  # type: ignore[arg-type]

    assert drawn(repetition_penalty=2.0) == [2]
    assert drawn(presence_penalty=5.0) == drawn(frequency_penalty=5.0) == [0]
    assert drawn(presence_penalty=-0.2) == [1]


def test_batches_that_ask_for_nothing_call_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sample", "apply_penalties", "apply_token_bitmask", "log_probabilities"):
        monkeypatch.setattr(ops, name, None)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    sampled = sample_rows(logits, [row_of(SamplingParams()) for _ in range(3)])
    assert sampled.token_ids.tolist() == logits.argmax(-1).tolist() and sampled.logprobs is None


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_whose_logits_are_no_numbers_are_known(temperature: float) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[1, 5], logits[2] = torch.nan, torch.nan
    sampled = sample_rows(logits, [row_of(SamplingParams(temperature=temperature)) for _ in range(4)])
    assert sampled.broken.tolist() == [False, True, True, False]
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < VOCAB)).all(), "the next step reads an embedding there"


def test_logits_are_copied_only_where_log_probabilities_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when someone asks and something else changes them, or not everyone asks."""
    given: list[torch.Tensor] = []
    whole = ops.log_probabilities
    monkeypatch.setattr(ops, "log_probabilities", lambda raw, *rest: given.append(raw) or whole(raw, *rest))

    def is_copied(*params: SamplingParams) -> bool:
        batch, token_cache = batch_of([row_of(p) for p in params])
        logits = torch.zeros(len(params), VOCAB)
        sample_tokens(logits, batch, batch.to_tensors(CPU), token_cache)
        raw = given.pop()
        assert len(raw) == sum(p.logprobs is not None for p in params)
        return raw is not logits

    asking = SamplingParams(logprobs=1)
    assert not is_copied(asking, asking)
    assert is_copied(asking, SamplingParams(), SamplingParams())
    assert is_copied(SamplingParams(logprobs=1, min_tokens=1), asking)
