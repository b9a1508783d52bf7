"""Fills a model's weights: streamed from safetensors, each rank reading only its slices, or seeded random numbers.

The layers say what they want (`WeightSlice`); this module knows files. Slices are cut into pieces that several threads copy.
A file is opened anew for each piece and closed behind it, since pages of an open file count as ours: so beside the weights
the host holds LOAD_THREADS pieces, however large the tensors are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchinfer.config import ConfigError, ModelConfig
from batchinfer.memory import gib
from batchinfer.model.config import ModelShape
from batchinfer.model.decoder import Decoder
from batchinfer.model.layers import WeightSlice

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHECKPOINT_DTYPES = ("BF16", "F16", "F32", "F64")
LOAD_THREADS = 4
PIECE_BYTES = 16 << 20  # of weights: opening a file of hundreds of tensors costs a hundredth of copying as much
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
        num_bytes = _stream(slices, shape, model_cfg.path)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # copies and random numbers are still under way
    return LoadReport(num_bytes, time.monotonic() - began)


def _stream(slices: list[WeightSlice], shape: ModelShape, path: str | None) -> int:
    if path is None:
        raise ConfigError("model.path is null: give a checkpoint folder, or model.load_format=random for weights without one")
    files = _files_by_tensor(Path(path))
    _require_same_names(path, {wish.name for wish in slices}, set(files), shape.tie_word_embeddings)
    by_file: dict[Path, list[WeightSlice]] = {}
    for wish in slices:
        by_file.setdefault(files[wish.name], []).append(wish)
    for file in by_file:
        _check_file(file, by_file[file])
    pieces = [(file, wish, rows) for file in sorted(by_file) for wish in by_file[file] for rows in _pieces(wish)]
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        return sum(pool.map(_copy, *zip(*pieces, strict=True)))


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """Which file of a checkpoint holds which tensor."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        try:
            return {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is not an index of safetensors: it must be JSON with a weight_map") from None
    if not single.exists():
        raise ConfigError(f"model.path={folder} holds neither {SINGLE} nor {INDEX}: only safetensors checkpoints can be loaded")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: the checkpoint's index names it") from None
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a safetensors file, or it is cut short: {error}") from None


def _check_file(path: Path, wishes: list[WeightSlice]) -> None:
    """ConfigError where a tensor is not what config.json calls for. Reads no more than the file's header."""
    with _open(path) as file:
        held = set(file.keys())
        for wish in wishes:
            if wish.name not in held:
                raise ConfigError(f"{path} lacks {wish.name}, which the checkpoint's index says it holds")
            tensor = file.get_slice(wish.name)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            if tuple(shape) != wish.shape:
                raise ConfigError(f"{path}: {wish.name} has shape {shape}, but config.json calls for {list(wish.shape)}")
            if dtype not in CHECKPOINT_DTYPES:
                raise ConfigError(f"{path}: {wish.name} has type {dtype}: it must be one of {', '.join(CHECKPOINT_DTYPES)}")


def _pieces(wish: WeightSlice) -> Iterator[slice]:
    """Rows of the destination, about PIECE_BYTES of them at a time. None for a rank beyond the end of a short vocabulary."""
    num_rows = len(wish.destination)
    rows_each = max(1, PIECE_BYTES * num_rows // max(1, wish.destination.nbytes))
    for row in range(0, num_rows, rows_each):
        yield slice(row, min(row + rows_each, num_rows))


def _copy(path: Path, wish: WeightSlice, rows: slice) -> int:
    """Fill these rows of the destination. Returns bytes written."""
    destination = wish.destination[rows]
    with _open(path) as file:
        tensor = file.get_slice(wish.name)
        if wish.dim == 0:
            destination.copy_(tensor[wish.start + rows.start : wish.start + rows.stop])
        else:
            destination.copy_(tensor[rows, wish.start : wish.stop])
    return destination.nbytes


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
