"""One engine step as flat arrays: all that a rank needs to execute it, in one int32 buffer.

A `Batch` *is* its buffer: a header of sizes, then one array after another, so sharing it with another host or copying it to a
GPU is one transfer. T tokens, S sequences, B blocks in the longest block table, N sequences that draw a token, F tokens that
may not be drawn, P prompt tokens whose log-probabilities are asked for. Rank 0 builds batches (`BatchBuilder`), the others
receive them (`engine.channel`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from batchinfer.engine.scheduler import ScheduledBatch
from batchinfer.engine.sequence import PENDING, Sequence

Array = TypeVar("Array")
HEADER_WORDS = 8  # T, S, B, N, F, P, how many tokens are fed, 0: an even number, so that the int64 array behind it is aligned
WORDS = {"int32": 1, "int64": 2, "float64": 2}
PARAMETERS = {
    "seeds": "int64",
    "temperature": "float64",
    "top_p": "float64",
    "min_p": "float64",
    "repetition_penalty": "float64",
    "presence_penalty": "float64",
    "frequency_penalty": "float64",
    "top_k": "int32",
    "num_logprobs": "int32",
    "prompt_lens": "int32",
}  # what a sequence is drawn with: fixed from its admission on


def _layout(header: np.ndarray) -> Iterator[tuple[str, int, tuple[int, ...], str]]:
    """(name, first word, shape, dtype) of each array. The order of `Batch`'s fields; int64 first, for its alignment."""
    t, s, b, n, f, p, _, _ = (int(size) for size in header)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        **{name: ((n,), dtype) for name, dtype in PARAMETERS.items()},
        "sample_rows": ((n,), "int32"),
        "sample_seqs": ((n,), "int32"),
        "sample_slots": ((n,), "int32"),
        "sample_positions": ((n,), "int32"),
        "forbidden": ((f, 2), "int32"),
        "prompt_rows": ((p,), "int32"),
        "prompt_targets": ((p,), "int32"),
        "prompt_num_logprobs": ((p,), "int32"),
        "token_ids": ((t,), "int32"),
        "positions": ((t,), "int32"),
        "slot_mapping": ((t,), "int32"),
        "cu_seqlens_q": ((s + 1,), "int32"),
        "context_lens": ((s,), "int32"),
        "block_tables": ((s, b), "int32"),
    }
    offset = HEADER_WORDS
    for name, (shape, dtype) in shapes.items():
        yield name, offset, shape, dtype
        offset += math.prod(shape) * WORDS[dtype]


@dataclass(frozen=True, slots=True, eq=False)
class BatchArrays(Generic[Array]):
    """The arrays of a step, over numpy on the host or torch on the device. Sequence order is that of the scheduled batch."""

    seeds: Array  # [N] int64, the bits of the requests' unsigned seeds
    temperature: Array  # [N] float64, as are the others that `SamplingParams` has as float
    top_p: Array  # [N]
    min_p: Array  # [N]
    repetition_penalty: Array  # [N]
    presence_penalty: Array  # [N]
    frequency_penalty: Array  # [N]
    top_k: Array  # [N]
    num_logprobs: Array  # [N] -1: no log-probabilities are asked for
    prompt_lens: Array  # [N]
    sample_rows: Array  # [N] which of the T tokens' hidden states a token is drawn from
    sample_seqs: Array  # [N] which of the S sequences it is drawn for
    sample_slots: Array  # [N] where the device keeps the drawn token, for the step that it is fed to
    sample_positions: Array  # [N] the position that the drawn token will have in its sequence
    forbidden: Array  # [F, 2] (which of the N, token id): what would end a sequence that is below its min_tokens
    prompt_rows: Array  # [P] which of the T tokens' hidden states says how likely the next prompt token is
    prompt_targets: Array  # [P] that next token
    prompt_num_logprobs: Array  # [P]
    token_ids: Array  # [T]; -1 - slot: the token that the step before drew into that slot
    positions: Array  # [T]
    slot_mapping: Array  # [T] where the KV cache takes the token's key and value
    cu_seqlens_q: Array  # [S + 1] where each sequence's tokens begin among the T, and T
    context_lens: Array  # [S] tokens of each sequence that attention sees, this step's included
    block_tables: Array  # [S, B], padded with 0


@dataclass(frozen=True, slots=True, eq=False)
class Batch(BatchArrays[np.ndarray]):
    """A step on the host. The arrays are views of `buffer`."""

    buffer: np.ndarray

    @classmethod
    def empty(
        cls,
        num_tokens: int,
        num_seqs: int,
        num_blocks: int,
        num_samples: int,
        num_forbidden: int = 0,
        num_prompt_rows: int = 0,
        num_fed: int = 0,
    ) -> Batch:
        """A batch of these sizes whose arrays are still to be filled in."""
        sizes = [num_tokens, num_seqs, num_blocks, num_samples, num_forbidden, num_prompt_rows, num_fed, 0]
        header = np.array(sizes, dtype=np.int32)
        *_, (_, offset, shape, _) = _layout(header)
        buffer = np.empty(offset + shape[0] * shape[1], dtype=np.int32)
        buffer[:HEADER_WORDS] = header
        return cls.unpack(buffer)

    def pack(self) -> np.ndarray:
        """The whole batch as one int32 array; no copy."""
        return self.buffer

    @classmethod
    def unpack(cls, buffer: np.ndarray) -> Batch:
        """The batch in a packed buffer; no copy."""
        views = {}
        for name, offset, shape, dtype in _layout(buffer[:HEADER_WORDS]):
            words = math.prod(shape) * WORDS[dtype]
            views[name] = buffer[offset : offset + words].view(dtype).reshape(shape)
        return cls(buffer=buffer, **views)

    @property
    def num_tokens(self) -> int:
        return int(self.buffer[0])

    @property
    def num_samples(self) -> int:
        return int(self.buffer[3])

    @property
    def num_fed(self) -> int:
        """How many of the tokens only the device knows."""
        return int(self.buffer[6])

    def to_tensors(self, device: torch.device) -> BatchArrays[torch.Tensor]:
        """The arrays on `device`, by one transfer."""
        flat = to_device(self.buffer, device)
        tensors = {}
        for name, offset, shape, dtype in _layout(self.buffer[:HEADER_WORDS]):
            words = math.prod(shape) * WORDS[dtype]
            tensors[name] = flat[offset : offset + words].view(getattr(torch, dtype)).view(shape)
        return BatchArrays(**tensors)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on `device`, by a transfer that the host does not wait for; on a CPU its own memory.

    From pageable memory the host would wait, and for all that was launched before.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class BatchBuilder:
    """Turns what the scheduler chose into a `Batch`.

    Each running sequence has a row in persistent arrays, so that a step copies only what is new: a block table grows by one
    entry every `block_size` steps, and sampling parameters never change.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self.block_size = block_size
        self.eos_token_ids = eos_token_ids
        self.rows: dict[int, int] = {}  # request id -> row
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.num_known_blocks = [0] * max_num_seqs  # entries of each row of `block_tables` that are filled in
        self.block_tables = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self.parameters = {name: np.zeros(max_num_seqs, dtype=dtype) for name, dtype in PARAMETERS.items()}

    def build(self, scheduled: ScheduledBatch) -> Batch:
        """The batch of one step. Sequences that gave up their blocks must have been released."""
        sequences, counts = scheduled.sequences, scheduled.num_scheduled_tokens
        rows = np.fromiter(map(self._row, sequences), dtype=np.int64, count=len(sequences))
        starts = np.array([seq.num_computed_tokens for seq in sequences], dtype=np.int32)
        num_known = np.array([len(seq.token_ids) for seq in sequences], dtype=np.int32)
        lengths = starts + np.array(counts, dtype=np.int32)
        (sampling,) = np.nonzero(lengths == num_known)
        token_ids = _scheduled_token_ids(sequences, counts)
        forbidden = self._forbidden([sequences[i] for i in sampling])
        prompt = _prompt_rows(sequences, counts)
        batch = Batch.empty(
            num_tokens=len(token_ids),
            num_seqs=len(sequences),
            num_blocks=-(-int(lengths.max()) // self.block_size),
            num_samples=len(sampling),
            num_forbidden=len(forbidden),
            num_prompt_rows=len(prompt),
            num_fed=token_ids.count(PENDING),
        )
        batch.token_ids[:] = token_ids
        batch.forbidden[:] = np.array(forbidden, dtype=np.int32).reshape(-1, 2)
        batch.context_lens[:] = lengths
        batch.cu_seqlens_q[0] = 0
        np.cumsum(lengths - starts, out=batch.cu_seqlens_q[1:])
        asked = np.array(prompt, dtype=np.int32).reshape(-1, 3).T
        batch.prompt_rows[:], batch.prompt_targets[:], batch.prompt_num_logprobs[:] = asked
        self._place(batch, rows, starts)
        self._describe_sampling(batch, rows[sampling], sampling)
        return batch

    def release(self, seq: Sequence) -> None:
        """Forget a sequence that no longer holds blocks (finished, aborted or preempted)."""
        row = self.rows.pop(seq.request.request_id, None)
        if row is not None:  # it may never have been scheduled
            self.num_known_blocks[row] = 0
            self.free_rows.append(row)

    def _row(self, seq: Sequence) -> int:
        """The row of `seq`, with all its blocks in it."""
        row = self.rows.get(seq.request.request_id)
        if row is None:
            row = self._admit(seq)
        known, table = self.num_known_blocks[row], seq.block_table
        if len(table) > known:
            self.block_tables[row, known : len(table)] = table[known:]
            self.num_known_blocks[row] = len(table)
        return row

    def _admit(self, seq: Sequence) -> int:
        row = self.rows[seq.request.request_id] = self.free_rows.pop()
        for name, value in _parameters(seq).items():
            self.parameters[name][row] = value
        self.block_tables[row] = 0
        return row

    def _forbidden(self, sequences: list[Sequence]) -> list[tuple[int, int]]:
        """(index, token id) of each token that would end one of the sequences, which draw a token, before its min_tokens."""
        forbidden = []
        for index, seq in enumerate(sequences):
            sampling = seq.request.sampling
            if len(seq.token_ids) - seq.num_prompt_tokens < sampling.min_tokens:
                ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self.eos_token_ids)
                forbidden += [(index, token_id) for token_id in ends]
        return forbidden

    def _place(self, batch: Batch, rows: np.ndarray, starts: np.ndarray) -> None:
        """Positions, slots and block tables, and where the device finds the tokens that it alone knows."""
        begins = batch.cu_seqlens_q[:-1]
        counts = np.diff(batch.cu_seqlens_q)
        token_rows = np.repeat(rows, counts)
        if batch.num_fed:
            np.copyto(batch.token_ids, -1 - token_rows, where=batch.token_ids == PENDING, casting="same_kind")
        positions = np.arange(batch.num_tokens, dtype=np.int32) + np.repeat(starts - begins, counts)
        batch.positions[:] = positions
        blocks = self.block_tables[token_rows, positions // self.block_size]
        batch.slot_mapping[:] = blocks * self.block_size + positions % self.block_size
        width = batch.block_tables.shape[1]
        np.take(self.block_tables[:, :width], rows, axis=0, out=batch.block_tables, mode="clip")

    def _describe_sampling(self, batch: Batch, rows: np.ndarray, sampling: np.ndarray) -> None:
        """`rows` of the persistent arrays and the places in the batch (`sampling`) of the sequences that draw a token."""
        batch.sample_rows[:] = batch.cu_seqlens_q[1:][sampling] - 1
        batch.sample_seqs[:], batch.sample_slots[:] = sampling, rows
        batch.sample_positions[:] = batch.context_lens[sampling]
        for name, values in self.parameters.items():
            np.take(values, rows, out=getattr(batch, name), mode="clip")


def _parameters(seq: Sequence) -> dict[str, float | int]:
    """The values of PARAMETERS for a sequence."""
    sampling, seed = seq.request.sampling, seq.request.seed
    return {
        "seeds": seed - 2**64 if seed >= 2**63 else seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "top_k": sampling.top_k,
        "num_logprobs": -1 if sampling.logprobs is None else sampling.logprobs,
        "prompt_lens": seq.num_prompt_tokens,
    }


def prompt_positions(seq: Sequence, count: int) -> range:
    """Positions, among the next `count`, after which a prompt token stands whose log-probability is asked for.

    What was computed before a preemption has been told already.
    """
    if seq.request.sampling.prompt_logprobs is None:
        return range(0)
    start = seq.num_computed_tokens
    return range(max(start, seq.num_prefilled_tokens), min(start + count, seq.num_prompt_tokens - 1))


def _prompt_rows(sequences: list[Sequence], counts: list[int]) -> list[tuple[int, int, int]]:
    """(which of the step's tokens, the prompt token behind it, how many of the likeliest to tell)."""
    rows: list[tuple[int, int, int]] = []
    begin = 0
    for seq, count in zip(sequences, counts, strict=True):
        asked = seq.request.sampling.prompt_logprobs
        if asked is not None:
            first = begin - seq.num_computed_tokens
            rows += [(first + i, seq.token_ids[i + 1], asked) for i in prompt_positions(seq, count)]
        begin += count
    return rows


def _scheduled_token_ids(sequences: list[Sequence], counts: list[int]) -> list[int]:
    token_ids: list[int] = []
    for seq, count in zip(sequences, counts, strict=True):
        start = seq.num_computed_tokens
        if count == 1:
            token_ids.append(seq.token_ids[start])
        else:
            token_ids += seq.token_ids[start : start + count]
    return token_ids
