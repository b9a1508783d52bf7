"""What became of each sample of a row, held small until its unit is written.

A unit's results may wait long for its last row. As Python objects a token with its five likeliest takes hundreds of bytes
meanwhile; in flat arrays it takes 60.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.data.schema import LOGPROBS
from batchinfer.engine.sequence import TokenLogprobs


class Logprobs:
    """What the model thought of each of a row of tokens, in order. A token of which nothing is known is null."""

    __slots__ = ("is_null", "logprobs", "num_top", "ranks", "token_ids", "top_logprobs", "top_token_ids")

    def __init__(self) -> None:
        self.is_null = array("b")
        self.token_ids, self.logprobs, self.ranks = array("i"), array("f"), array("i")
        self.num_top = array("i")
        self.top_token_ids, self.top_logprobs = array("i"), array("f")  # of all tokens, one after the other

    def __len__(self) -> int:
        return len(self.token_ids)

    def extend(self, tokens: Iterable[TokenLogprobs | None]) -> None:
        for token in tokens:
            self.is_null.append(token is None)
            self.token_ids.append(token.token_id if token else 0)
            self.logprobs.append(token.logprob if token else 0)
            self.ranks.append(token.rank if token else 0)
            top = token.top if token else []
            self.num_top.append(len(top))
            for token_id, logprob in top:
                self.top_token_ids.append(token_id)
                self.top_logprobs.append(logprob)


@dataclass(slots=True)
class RowResult:
    """What became of one sample of a row; the writer turns a unit's worth of these into columns.

    While it goes on `step_last` is None, and `latency_s` is the time that it took in replicas which were stopped.
    """

    num_prompt_tokens: int = 0
    completion: str | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "error"
    error: str | None = None
    error_message: str | None = None
    ttft_s: float | None = None
    latency_s: float | None = None
    step_first: int | None = None
    step_last: int | None = None
    sample: int = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None  # of a row's first sample; the others have the same prompt
    prompt_hash: int = 0  # `data.partials.prompt_hash`
    replica: str | None = None  # who finished it, whose steps `step_first` and `step_last` are; None: who writes the unit

    @property
    def ended(self) -> bool:
        return self.error is not None or self.step_last is not None


def logprobs_column(rows: Sequence[Logprobs | None]) -> pa.ListArray:
    """One value of type `schema.LOGPROBS` for each row; null for None. The arrays are copied once, whatever their number."""
    known = [row for row in rows if row is not None]
    token_type = LOGPROBS.value_type
    top_type = token_type.field("top").type
    likeliest = pa.StructArray.from_arrays(
        [
            pa.array(_joined([row.top_token_ids for row in known], np.int32)),
            pa.array(_joined([row.top_logprobs for row in known], np.float32)),
        ],
        fields=list(top_type.value_type),
    )
    is_null = _joined([row.is_null for row in known], np.int8).astype(bool)
    tokens = pa.StructArray.from_arrays(
        [
            pa.array(_joined([row.token_ids for row in known], np.int32)),
            pa.array(_joined([row.logprobs for row in known], np.float32)),
            pa.array(_joined([row.ranks for row in known], np.int32)),
            pa.ListArray.from_arrays(_offsets(_joined([row.num_top for row in known], np.int32)), likeliest, type=top_type),
        ],
        fields=list(token_type),
        mask=pa.array(is_null),
    )
    lengths = np.fromiter((0 if row is None else len(row) for row in rows), np.int64, len(rows))
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(_offsets(lengths), tokens, type=LOGPROBS, mask=missing)


def logprobs_rows(column: pa.ChunkedArray) -> list[Logprobs | None]:
    """What `logprobs_column` was made of."""
    return [_logprobs(value.values) if value.is_valid else None for value in column]


def _logprobs(tokens: pa.StructArray) -> Logprobs:
    row = Logprobs()
    row.is_null.extend(tokens.is_null().cast(pa.int8()).to_pylist())
    token_ids, logprobs, ranks, top = tokens.flatten()  # null where the token is
    top_token_ids, top_logprobs = top.flatten().flatten()
    row.token_ids.extend(token_ids.fill_null(0).to_pylist())
    row.logprobs.extend(logprobs.fill_null(0).to_pylist())
    row.ranks.extend(ranks.fill_null(0).to_pylist())
    row.num_top.extend(pc.fill_null(pc.list_value_length(top), 0).to_pylist())
    row.top_token_ids.extend(top_token_ids.to_pylist())
    row.top_logprobs.extend(top_logprobs.to_pylist())
    return row


def _joined(parts: Sequence[array[Any]], dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.frombuffer(part, dtype) for part in parts] or [np.empty(0, dtype)])


def _offsets(lengths: np.ndarray[Any, Any]) -> pa.Array:
    """Where each list begins. ArrowInvalid when a unit has more values than Arrow's lists can number."""
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])).cast(pa.int32())
