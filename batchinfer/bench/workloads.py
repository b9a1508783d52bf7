"""What is run when an engine is measured: lists of (prompt token ids, completion length), the same for every engine.

The named workloads are drawn from seeds by calls in a fixed order, so that they are the same requests wherever they are made:
`mixed` shares nothing, `shared` has one prefix for all, `long_out` is all decode, `single` is one request alone. `custom` has the
lengths that the config says; a Parquet file brings its own. Everything is greedy and goes on past the end-of-sequence token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import BenchConfig, ConfigError, show

FIRST_ID, LAST_ID = 10, 31_989  # of the named workloads' token ids: any Llama-2 token that has a text
FILE_COLUMNS = ("token_ids", "max_tokens")


@dataclass(frozen=True, slots=True)
class BenchRequest:
    token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    name: str
    requests: list[BenchRequest]

    @property
    def tokens_in(self) -> int:
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def tokens_out(self) -> int:
        return sum(request.max_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, completion included."""
        return max(len(request.token_ids) + request.max_tokens for request in self.requests)


def load_workloads(bench: BenchConfig, seed: int, vocab_size: int, max_model_len: int) -> list[Workload]:
    """The workloads that the config names, for a model of these sizes. `seed` is that of `custom`.

    ConfigError: a request is too long, or has a token that the model does not know; a file that holds no requests.
    """
    if bench.requests is not None:
        workloads = [Workload(Path(bench.requests).stem, read_requests(bench.requests))]
    else:
        workloads = [Workload(name, _draw(name, bench, seed, vocab_size)) for name in bench.workload]
    for workload in workloads:
        _check_fit(workload, bench, vocab_size, max_model_len)
    return workloads


def named_requests(name: str, seed: int = 0) -> list[BenchRequest]:
    """The requests of mixed, shared, long_out or single."""
    draw = random.Random(seed)
    return [BenchRequest(prompt, length) for prompt, length in NAMED[name](draw)]


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(FIRST_ID, LAST_ID + 1) for _ in range(count)]


Drawn = Iterable[tuple[list[int], int]]


def _mixed(draw: random.Random) -> Drawn:
    for _ in range(1024):
        yield _tokens(draw, draw.randint(64, 1024)), draw.randint(64, 512)


def _shared(draw: random.Random) -> Drawn:
    prefix = _tokens(draw, 1024)
    for _ in range(1024):
        yield prefix + _tokens(draw, draw.randint(32, 256)), draw.randint(16, 128)


def _long_out(draw: random.Random) -> Drawn:
    for _ in range(256):
        yield _tokens(draw, 128), 1024


def _single(draw: random.Random) -> Drawn:
    yield _tokens(draw, 128), 128


NAMED: dict[str, Callable[[random.Random], Drawn]] = {
    "mixed": _mixed,
    "shared": _shared,
    "long_out": _long_out,
    "single": _single,
}


def _draw(name: str, bench: BenchConfig, seed: int, vocab_size: int) -> list[BenchRequest]:
    if name in NAMED:
        return named_requests(name)
    draw = random.Random(seed)
    prefix = [draw.randrange(vocab_size) for _ in range(bench.shared_prefix_len)]
    requests = []
    for _ in range(bench.num_requests):
        own = draw.randint(*_bounds(bench.input_len))
        prompt = prefix + [draw.randrange(vocab_size) for _ in range(own)]
        requests.append(BenchRequest(prompt, draw.randint(*_bounds(bench.output_len))))
    return requests


def _bounds(length: int | list[int]) -> tuple[int, int]:
    low, high = (length, length) if isinstance(length, int) else length
    return low, high


def read_requests(path: str) -> list[BenchRequest]:
    """The requests of a Parquet file. ConfigError names the column and the row at fault."""
    try:
        file = pq.ParquetFile(Path(path).expanduser())
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{show('bench.requests', path)}: not a Parquet file that can be read ({error})") from None
    with file:
        missing = [name for name in FILE_COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise ConfigError(
                f"{show('bench.requests', path)}: has no column {missing[0]}; it needs {' and '.join(FILE_COLUMNS)}"
            )
        _check_types(path, file.schema_arrow)
        columns = file.read(list(FILE_COLUMNS))
    if not len(columns):
        raise ConfigError(f"{show('bench.requests', path)}: holds no row")
    rows = zip(*(columns[name].to_pylist() for name in FILE_COLUMNS), strict=True)
    return [_read_row(path, number, *row) for number, row in enumerate(rows)]


def _check_types(path: str, schema: pa.Schema) -> None:
    ids, count = (schema.field(name).type for name in FILE_COLUMNS)
    is_list = pa.types.is_list(ids) or pa.types.is_large_list(ids) or pa.types.is_fixed_size_list(ids)
    for name, kind, right, valid in (
        ("token_ids", ids, is_list and pa.types.is_integer(ids.value_type), "lists of integers"),
        ("max_tokens", count, pa.types.is_integer(count), "integers"),
    ):
        if not right:
            raise ConfigError(f"{show('bench.requests', path)}: column {name} holds {kind}; it must hold {valid}")


def _read_row(path: str, number: int, token_ids: list[Any] | None, max_tokens: int | None) -> BenchRequest:
    where = f"{show('bench.requests', path)}: row {number:,}"
    if not token_ids or None in token_ids:
        raise ConfigError(f"{where}: token_ids must be a list of at least one token id, without null")
    if max_tokens is None or max_tokens < 1:
        raise ConfigError(f"{where}: max_tokens must be at least 1, not {'null' if max_tokens is None else max_tokens}")
    return BenchRequest(token_ids, max_tokens)


def _check_fit(workload: Workload, bench: BenchConfig, vocab_size: int, max_model_len: int) -> None:
    where = show("bench.requests", bench.requests) if bench.requests is not None else show("bench.workload", workload.name)
    for number, request in enumerate(workload.requests):
        worst = max(request.token_ids) if min(request.token_ids) >= 0 else min(request.token_ids)
        if not 0 <= worst < vocab_size:
            hint = "" if workload.name not in NAMED else "; bench.workload=custom draws from any vocabulary"
            raise ConfigError(
                f"{where}: request {number:,} has the token id {worst}, the model knows 0 to {vocab_size - 1}{hint}"
            )
        length = len(request.token_ids) + request.max_tokens
        if length > max_model_len:
            raise ConfigError(
                f"{where}: request {number:,} has {len(request.token_ids):,} tokens and {request.max_tokens:,} to generate, "
                f"more than {show('model.max_model_len', max_model_len)}"
            )
