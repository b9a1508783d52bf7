"""Fills a model's weights: streamed from safetensors, each rank reading only its slices, or seeded random numbers.

The layers say what they want (`WeightSlice`); `safetensors_file` knows files; this module joins them. Slices are cut into
pieces, which several threads read into a few host buffers. On a GPU those are pinned, and what is in one goes to the device
while others are filled. So beside the weights the host holds NUM_BUFFERS pieces for each thread, and the columns of one that it
is reading, however large the tensors are.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from batchinfer.config import ConfigError, ModelConfig
from batchinfer.hardware import usable_cores
from batchinfer.memory import gib
from batchinfer.model.checkpoint import cut_short, files_by_tensor, lacks, open_weights
from batchinfer.model.config import ModelShape
from batchinfer.model.decoder import Decoder
from batchinfer.model.layers import WeightSlice
from batchinfer.model.safetensors_file import NotSafetensors, SafetensorsFile, StoredTensor

CHECKPOINT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_READERS = 8  # threads; one copies about 8 GB/s out of the page cache, a host link of PCIe 5 takes 55
PIECE_BYTES = 8 << 20  # of the checkpoint: large beside the Python around it, small enough that pinning takes no time
TASK_PIECES = 4  # that a reader takes at once: handing over a task takes as long as the Python of a piece
NUM_BUFFERS = 2  # of a reader: one is filled while the other is on its way
RANDOM_STD = 0.02
MAX_NAMES = 5  # of tensors in an error sentence


@dataclass(frozen=True)
class LoadReport:
    """What loading took on this rank: bytes put into weights, and seconds."""

    bytes: int
    seconds: float

    def explain(self) -> str:
        return f"{gib(self.bytes)} of weights in {self.seconds:.1f} s, {self.bytes / self.seconds / 1e9:.1f} GB/s"


def load_weights(model: Decoder, shape: ModelShape, model_cfg: ModelConfig, seed: int, device: torch.device) -> LoadReport:
    """Fill every weight of `model`, which lies on `device`. `seed` is that of load_format=random.

    ConfigError: no safetensors at model.path, a tensor missing, of another shape, left over, or of a type that is not a
    plain float; a file that is not safetensors.
    """
    began = time.monotonic()
    slices = list(model.slices())
    if model_cfg.load_format == "random":
        num_bytes = _fill_random(slices, seed, device)
    else:
        num_bytes = _stream(slices, shape, model_cfg.path, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # copies and random numbers are still under way
    return LoadReport(num_bytes, time.monotonic() - began)


def _stream(slices: list[WeightSlice], shape: ModelShape, path: str | None, device: torch.device) -> int:
    if path is None:
        raise ConfigError("model.path is null: give a checkpoint folder, or model.load_format=random for weights without one")
    files = files_by_tensor(Path(path))
    _require_same_names(path, {wish.name for wish in slices}, set(files), shape.tie_word_embeddings)
    with contextlib.ExitStack() as stack:
        paths = {files[wish.name] for wish in slices}
        opened = {path: stack.enter_context(contextlib.closing(open_weights(path))) for path in paths}
        pieces = [piece for wish in slices for piece in _pieces(opened[files[wish.name]], wish)]
        pieces.sort(key=lambda piece: (piece.file.path, piece.tensor.begin, piece.rows.start))
        return _load(pieces, device)


def _load(pieces: list[_Piece], device: torch.device) -> int:
    readers = min(MAX_READERS, usable_cores())
    staging = _Staging(device, NUM_BUFFERS * readers, max((math.prod(piece.shape) for piece in pieces), default=0))
    tasks = [pieces[at : at + TASK_PIECES] for at in range(0, len(pieces), TASK_PIECES)]
    with ThreadPoolExecutor(readers, initializer=staging.enter) as pool:
        try:
            return sum(pool.map(staging.bring_all, tasks))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _require_same_names(path: str, wanted: set[str], present: set[str], tied: bool) -> None:
    tolerated = {name for name in present if name.endswith("rotary_emb.inv_freq")}  # old checkpoints; we compute them
    if tied:
        tolerated.add("lm_head.weight")  # a copy of the embedding
    missing, left_over = wanted - present, present - wanted - tolerated
    problems = []
    if missing:
        problems.append(f"lacks {_names(missing)}")
    if left_over:
        problems.append(f"holds {_names(left_over)} without a place for it")
    if problems:
        raise ConfigError(f"model.path={path} is not what its config.json describes: it {' and '.join(problems)}")


def _names(names: Collection[str]) -> str:
    """How many tensors, and which."""
    ordered = sorted(names)
    count = f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"
    return f"{count} ({', '.join(ordered[:MAX_NAMES])}{', ...' if len(ordered) > MAX_NAMES else ''})"


def _find(file: SafetensorsFile, wish: WeightSlice) -> StoredTensor:
    """ConfigError where the tensor is not what config.json calls for."""
    tensor = file.tensors.get(wish.name)
    if tensor is None:
        raise lacks(file.path, wish.name)
    if tensor.shape != wish.shape:
        raise ConfigError(
            f"{file.path}: {wish.name} has shape {list(tensor.shape)}, but config.json calls for {list(wish.shape)}"
        )
    if tensor.dtype not in CHECKPOINT_DTYPES:
        valid = ", ".join(CHECKPOINT_DTYPES)
        raise ConfigError(f"{file.path}: {wish.name} has type {tensor.dtype}: it must be one of {valid}")
    return tensor


@dataclass(frozen=True, eq=False)
class _Piece:
    """What is read at once: rows of a tensor, of each the bytes `columns`, for `destination`, which has as many rows."""

    file: SafetensorsFile
    tensor: StoredTensor
    rows: slice
    columns: slice
    destination: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def _pieces(file: SafetensorsFile, wish: WeightSlice) -> Iterator[_Piece]:
    """About PIECE_BYTES at a time. None for a rank beyond the end of a short vocabulary."""
    tensor = _find(file, wish)
    first, columns = (wish.start, slice(0, tensor.row_bytes)) if wish.dim == 0 else (0, _columns(tensor, wish))
    num_rows = len(wish.destination)
    rows_each = max(1, PIECE_BYTES // (columns.stop - columns.start))
    for row in range(0, num_rows, rows_each):
        stop = min(row + rows_each, num_rows)
        yield _Piece(file, tensor, slice(first + row, first + stop), columns, wish.destination[row:stop])


def _columns(tensor: StoredTensor, wish: WeightSlice) -> slice:
    item_bytes = tensor.row_bytes // tensor.shape[1]
    return slice(wish.start * item_bytes, wish.stop * item_bytes)


class _Buffer:
    """Host memory that pieces pass through, made by the thread that needs it first: pinning takes a while.

    There are thousands of pieces and one interpreter for all readers, so each costs as few calls as can be.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes, self._device = num_bytes, device
        self._sent = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self._array: np.ndarray | None = None  # the same memory,
        self._typed: dict[torch.dtype, Tensor] = {}  # and as each type that was asked for

    def room(self, shape: tuple[int, int]) -> np.ndarray:
        """uint8 of that shape, as soon as the device has what was in it last."""
        if self._array is None:
            whole = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=self._sent is not None)
            self._array = whole.numpy()
            self._typed[torch.uint8] = whole
        elif self._sent is not None:
            self._sent.synchronize()
        return self._array[: math.prod(shape)].reshape(shape)

    def send(self, dtype: torch.dtype, destination: Tensor) -> None:
        """Launch the copy of what is in it, elements of `dtype`, to `destination`, on the current stream."""
        if dtype not in self._typed:
            usable = self._num_bytes // dtype.itemsize * dtype.itemsize
            self._typed[dtype] = self._typed[torch.uint8][:usable].view(dtype)
        values = self._typed[dtype][: destination.numel()].view_as(destination)
        if self._sent is None:
            destination.copy_(values)
            return
        if dtype != destination.dtype:  # by the device: `copy_` would have the host cast, and wait for it
            values = values.to(self._device, non_blocking=True)
        destination.copy_(values, non_blocking=True)
        self._sent.record()


class _Staging:
    """The way of pieces from files to the device through a ring of buffers, for as many threads as there are buffers."""

    def __init__(self, device: torch.device, num_buffers: int, num_bytes: int) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # on which the weights are made zero
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(num_buffers):
            self._free.put(_Buffer(num_bytes, device))

    def enter(self) -> None:
        """Each thread, before anything else: it would begin with the first GPU and its default stream, whatever others chose."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def bring_all(self, pieces: Sequence[_Piece]) -> int:
        """Read pieces, and launch their copies into the weights. Returns bytes of the weights."""
        return sum(map(self._bring, pieces))

    def _bring(self, piece: _Piece) -> int:
        buffer = self._free.get()
        try:
            piece.file.read(piece.tensor, piece.rows, piece.columns, buffer.room(piece.shape))
            buffer.send(CHECKPOINT_DTYPES[piece.tensor.dtype], piece.destination)
        except NotSafetensors as error:
            raise cut_short(piece.file.path, error) from None
        finally:
            self._free.put(buffer)
        return piece.destination.nbytes


def _fill_random(slices: list[WeightSlice], seed: int, device: torch.device) -> int:
    for wish in slices:
        whole = random_tensor(wish.name, wish.shape, seed, wish.destination.dtype, device)
        wish.destination.copy_(whole.narrow(wish.dim, wish.start, wish.stop - wish.start))
    return sum(wish.destination.nbytes for wish in slices)


def random_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A whole parameter, the same on every rank: normal with RANDOM_STD, around 1 for norms."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)
    whole = torch.empty(shape, dtype=dtype, device=device).normal_(0, RANDOM_STD, generator=generator)
    return whole + 1 if name.endswith("norm.weight") else whole
