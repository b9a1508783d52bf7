"""One engine step as flat arrays: all that a rank needs to execute it, in one int32 buffer.

A `Batch` *is* its buffer: a header of five sizes, then one array after another, so sharing it with another host or copying
it to a GPU is one transfer. T tokens, S sequences, B blocks in the longest block table, N sequences that draw a token, F
tokens that may not be drawn. Rank 0 builds batches (`BatchBuilder`), the others receive them (`BatchChannel`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from batchinfer.engine.scheduler import ScheduledBatch
from batchinfer.engine.sequence import Sequence

Array = TypeVar("Array")
HEADER_WORDS = 6  # T, S, B, N, F, 0: an even number, so that the int64 array behind it is aligned


def _layout(header: np.ndarray) -> Iterator[tuple[str, int, tuple[int, ...], str]]:
    """(name, first word, shape, dtype) of each array. The order of `Batch`'s fields; int64 first, for its alignment."""
    t, s, b, n, f, _ = (int(size) for size in header)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "seeds": ((n,), "int64"),
        "temperature": ((n,), "float32"),
        "top_p": ((n,), "float32"),
        "min_p": ((n,), "float32"),
        "top_k": ((n,), "int32"),
        "sample_rows": ((n,), "int32"),
        "sample_positions": ((n,), "int32"),
        "forbidden": ((f, 2), "int32"),
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
        offset += math.prod(shape) * (2 if dtype == "int64" else 1)


@dataclass(frozen=True, slots=True, eq=False)
class BatchArrays(Generic[Array]):
    """The arrays of a step, over numpy on the host or torch on the device. Sequence order is that of the scheduled batch."""

    seeds: Array  # [N] int64, the bits of the requests' unsigned seeds
    temperature: Array  # [N] float32
    top_p: Array  # [N] float32
    min_p: Array  # [N] float32
    top_k: Array  # [N]
    sample_rows: Array  # [N] which of the T tokens' hidden states a token is drawn from
    sample_positions: Array  # [N] the position that the drawn token will have in its sequence
    forbidden: Array  # [F, 2] (which of the N, token id): what would end a sequence that is below its min_tokens
    token_ids: Array  # [T]
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
    def empty(cls, num_tokens: int, num_seqs: int, num_blocks: int, num_samples: int, num_forbidden: int = 0) -> Batch:
        """A batch of these sizes whose arrays are still to be filled in."""
        header = np.array([num_tokens, num_seqs, num_blocks, num_samples, num_forbidden, 0], dtype=np.int32)
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
            words = math.prod(shape) * (2 if dtype == "int64" else 1)
            views[name] = buffer[offset : offset + words].view(dtype).reshape(shape)
        return cls(buffer=buffer, **views)

    @property
    def num_tokens(self) -> int:
        return int(self.buffer[0])

    @property
    def num_samples(self) -> int:
        return int(self.buffer[3])

    def to_tensors(self, device: torch.device) -> BatchArrays[torch.Tensor]:
        """The arrays on `device`, by one transfer that the host does not wait for."""
        flat = torch.from_numpy(self.buffer)
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        tensors = {}
        for name, offset, shape, dtype in _layout(self.buffer[:HEADER_WORDS]):
            words = math.prod(shape) * (2 if dtype == "int64" else 1)
            tensors[name] = flat[offset : offset + words].view(getattr(torch, dtype)).view(shape)
        return BatchArrays(**tensors)


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
        self.seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self.temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self.top_p = np.ones(max_num_seqs, dtype=np.float32)
        self.min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self.top_k = np.zeros(max_num_seqs, dtype=np.int32)

    def build(self, scheduled: ScheduledBatch) -> Batch:
        """The batch of one step. Sequences that gave up their blocks must have been released."""
        sequences, counts = scheduled.sequences, scheduled.num_scheduled_tokens
        rows = np.fromiter(map(self._row, sequences), dtype=np.int64, count=len(sequences))
        starts = np.array([seq.num_computed_tokens for seq in sequences], dtype=np.int32)
        num_known = np.array([len(seq.token_ids) for seq in sequences], dtype=np.int32)
        lengths = starts + np.array(counts, dtype=np.int32)
        (sampling,) = np.nonzero(lengths == num_known)
        forbidden = self._forbidden([sequences[i] for i in sampling])
        width = -(-int(lengths.max()) // self.block_size)
        batch = Batch.empty(sum(counts), len(sequences), width, len(sampling), len(forbidden))
        batch.forbidden[:] = np.array(forbidden, dtype=np.int32).reshape(-1, 2)
        batch.token_ids[:] = _scheduled_token_ids(sequences, counts)
        batch.context_lens[:] = lengths
        batch.cu_seqlens_q[0] = 0
        np.cumsum(lengths - starts, out=batch.cu_seqlens_q[1:])
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
        sampling = seq.request.sampling
        self.seeds[row] = seq.request.seed
        self.temperature[row], self.top_k[row] = sampling.temperature, sampling.top_k
        self.top_p[row], self.min_p[row] = sampling.top_p, sampling.min_p
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
        """Positions, slots and block tables."""
        begins = batch.cu_seqlens_q[:-1]
        counts = np.diff(batch.cu_seqlens_q)
        token_rows = np.repeat(rows, counts)
        positions = np.arange(batch.num_tokens, dtype=np.int32) + np.repeat(starts - begins, counts)
        batch.positions[:] = positions
        blocks = self.block_tables[token_rows, positions // self.block_size]
        batch.slot_mapping[:] = blocks * self.block_size + positions % self.block_size
        width = batch.block_tables.shape[1]
        np.take(self.block_tables[:, :width], rows, axis=0, out=batch.block_tables, mode="clip")

    def _describe_sampling(self, batch: Batch, rows: np.ndarray, sampling: np.ndarray) -> None:
        """`rows` of the persistent arrays and the places in the batch (`sampling`) of the sequences that draw a token."""
        batch.sample_rows[:] = batch.cu_seqlens_q[1:][sampling] - 1
        batch.sample_positions[:] = batch.context_lens[sampling]
        batch.seeds[:] = self.seeds[rows].view(np.int64)
        for name in ("temperature", "top_p", "min_p", "top_k"):
            getattr(batch, name)[:] = getattr(self, name)[rows]


def _scheduled_token_ids(sequences: list[Sequence], counts: list[int]) -> list[int]:
    token_ids: list[int] = []
    for seq, count in zip(sequences, counts, strict=True):
        start = seq.num_computed_tokens
        if count == 1:
            token_ids.append(seq.token_ids[start])
        else:
            token_ids += seq.token_ids[start : start + count]
    return token_ids


class BatchChannel:
    """Carries batches from rank 0 to the other ranks' hosts over a gloo group: the size in words first, then the words.

    Size 0 is the message to stop. NCCL would do the same only after a wait on the GPU.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def send(self, batch: Batch) -> None:
        buffer = batch.pack()
        self._broadcast(np.array([buffer.size], dtype=np.int64))
        self._broadcast(buffer)

    def send_stop(self) -> None:
        self._broadcast(np.zeros(1, dtype=np.int64))

    def receive(self) -> Batch | None:
        """The next batch; None: rank 0 has sent `send_stop`."""
        size = np.zeros(1, dtype=np.int64)
        self._broadcast(size)
        if size[0] == 0:
            return None
        buffer = np.empty(int(size[0]), dtype=np.int32)
        self._broadcast(buffer)
        return Batch.unpack(buffer)

    def _broadcast(self, array: np.ndarray) -> None:
        dist.broadcast(torch.from_numpy(array), group=self.group, group_src=0)
