"""A batch says what the scheduler chose, token by token, and survives the way to another rank."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from batchinfer.engine.batch import HEADER_WORDS, Batch, BatchArrays, BatchBuilder
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.scheduler import ScheduledBatch
from batchinfer.engine.sequence import PENDING, Request, SamplingParams, Sequence

BLOCK_SIZE = 4
ARRAYS = [field.name for field in dataclasses.fields(BatchArrays)]


def sampled_sequence(request_id: int, tokens: list[int], seed: int = 0, **sampling: object) -> Sequence:
    request = Request(request_id, tokens, SamplingParams(**sampling), seed)  # type: ignore[arg-type]
    return Sequence.from_request(request, now=0.0, max_model_len=100)


def two_sequences() -> tuple[BatchBuilder, ScheduledBatch]:
    """One in decode with blocks 2, 0, one that prefills tokens 2 to 5 of 6 with blocks 1, 3."""
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.25, "logprobs": 4}
    penalties = {"repetition_penalty": 1.25, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    decoding = sampled_sequence(7, [10, 11, 12, 13, 14], seed=2**64 - 1, **drawn, **penalties)
    decoding.block_table, decoding.num_computed_tokens = [2, 0], 4
    prefilling = sampled_sequence(8, [20, 21, 22, 23, 24, 25], prompt_logprobs=2)
    prefilling.block_table, prefilling.num_computed_tokens = [1, 3], 2
    prefilling.num_prefilled_tokens = 3  # before a preemption
    builder = BatchBuilder(max_num_seqs=4, max_blocks_per_seq=5, block_size=BLOCK_SIZE)
    return builder, ScheduledBatch([decoding, prefilling], [1, 3])


def test_every_array_of_a_small_batch() -> None:
    builder, scheduled = two_sequences()
    batch = builder.build(scheduled)
    assert {name: getattr(batch, name).tolist() for name in ARRAYS} == {
        "token_ids": [14, 22, 23, 24],
        "positions": [4, 2, 3, 4],
        "slot_mapping": [0, 1 * 4 + 2, 1 * 4 + 3, 3 * 4],
        "cu_seqlens_q": [0, 1, 4],
        "context_lens": [5, 5],
        "block_tables": [[2, 0], [1, 3]],
        "sample_rows": [0],
        "sample_positions": [5],
        "seeds": [-1],
        "temperature": [0.5],
        "top_p": [0.9],
        "min_p": [0.25],
        "repetition_penalty": [1.25],
        "presence_penalty": [0.5],
        "frequency_penalty": [-0.5],
        "top_k": [3],
        "num_logprobs": [4],
        "prompt_lens": [5],
        "sample_seqs": [0],
        "sample_slots": [0],
        "forbidden": [],
        "prompt_rows": [2, 3],
        "prompt_targets": [24, 25],
        "prompt_num_logprobs": [2, 2],
    }


def test_a_chunk_that_computes_the_last_token_samples() -> None:
    builder, scheduled = two_sequences()
    scheduled.num_scheduled_tokens[1] = 4
    batch = builder.build(scheduled)
    assert batch.sample_rows.tolist() == [0, 4] and batch.sample_positions.tolist() == [5, 6]


def test_a_pending_token_names_the_slot_that_it_was_drawn_into() -> None:
    builder, scheduled = two_sequences()
    first = builder.build(scheduled)
    decoding, prefilling = scheduled.sequences
    decoding.num_computed_tokens, prefilling.num_computed_tokens = 5, 5
    decoding.token_ids.append(PENDING)
    batch = builder.build(ScheduledBatch([prefilling, decoding], [1, 1]))
    assert batch.token_ids.tolist() == [25, -1 - first.sample_slots[0]] and batch.num_fed == 1
    assert batch.positions.tolist() == [5, 5] and batch.prompt_rows.tolist() == []


def test_what_would_end_a_sequence_too_early_is_forbidden() -> None:
    builder = BatchBuilder(4, 4, BLOCK_SIZE, eos_token_ids=frozenset({2}))
    sequences = [
        sampled_sequence(0, [1], min_tokens=0),
        sampled_sequence(1, [1], min_tokens=1, ignore_eos=True, stop_token_ids=(7,)),
        sampled_sequence(2, [1], min_tokens=1, stop_token_ids=(8,)),
        sampled_sequence(3, [1], min_tokens=1),
    ]
    sequences[3].token_ids.append(5)
    for seq, count in zip(sequences, (1, 1, 1, 2), strict=True):
        seq.block_table = [seq.request.request_id]
        assert seq.num_tokens == count
    batch = builder.build(ScheduledBatch(sequences, [1, 1, 1, 2]))
    assert sorted(batch.forbidden.tolist()) == [[1, 7], [2, 2], [2, 8]]


@pytest.mark.parametrize("num_samples", [0, 1, 3])
def test_packing_keeps_every_array(num_samples: int) -> None:
    batch = Batch.empty(
        num_tokens=7, num_seqs=3, num_blocks=2, num_samples=num_samples, num_forbidden=2, num_prompt_rows=5, num_fed=1
    )
    batch.buffer[HEADER_WORDS:] = np.random.default_rng(0).integers(0, 1 << 29, batch.buffer.size - HEADER_WORDS)
    copy = Batch.unpack(batch.pack().copy())
    assert sum(getattr(batch, name).nbytes for name in ARRAYS) == batch.buffer[HEADER_WORDS:].nbytes
    for name in ARRAYS:
        assert getattr(batch, name).dtype == getattr(copy, name).dtype
        np.testing.assert_array_equal(getattr(batch, name), getattr(copy, name))
    assert (copy.num_tokens, copy.num_samples, copy.num_fed) == (7, num_samples, 1)


def test_tensors_equal_the_arrays() -> None:
    builder, scheduled = two_sequences()
    batch = builder.build(scheduled)
    tensors = batch.to_tensors(torch.device("cpu"))
    for name in ARRAYS:
        tensor, array = getattr(tensors, name), getattr(batch, name)
        assert tensor.dtype == torch.from_numpy(array.copy()).dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_block_tables_follow_sequences_that_grow_and_are_replaced() -> None:
    """Random growth, preemption and replacement: the persistent rows always equal the sequences' own tables."""
    rng = random.Random(1)
    blocks = BlockManager(num_blocks=40, block_size=BLOCK_SIZE)
    builder = BatchBuilder(max_num_seqs=3, max_blocks_per_seq=12, block_size=BLOCK_SIZE)
    running: list[Sequence] = []
    for number in range(300):
        if len(running) == 3:
            victim = running.pop(rng.randrange(3))
            blocks.free(victim)
            builder.release(victim)
        running.append(sampled_sequence(number % 5 if all(s.request.request_id != number % 5 for s in running) else number, [1]))
        for seq in running:
            more = rng.randint(1, 3) if len(seq.token_ids) < 44 else 0
            seq.num_computed_tokens = len(seq.token_ids) - 1
            seq.token_ids += [number] * more
            blocks.allocate(seq, len(seq.token_ids))
        batch = builder.build(ScheduledBatch(list(running), [s.num_tokens - s.num_computed_tokens for s in running]))
        for seq, row in zip(running, batch.block_tables.tolist(), strict=True):
            assert row[: len(seq.block_table)] == seq.block_table
            assert not any(row[len(seq.block_table) :])


def test_releasing_what_was_never_scheduled_is_nothing() -> None:
    builder = BatchBuilder(2, 2, BLOCK_SIZE)
    builder.release(sampled_sequence(0, [1]))
    assert len(builder.free_rows) == 2
