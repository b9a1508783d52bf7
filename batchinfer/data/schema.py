"""Facts about files: names and types of the output columns, what a unit's footer says, and which error codes exist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 3
FOOTER_KEY = b"batchinfer"  # one JSON object (`UnitFooter`) in the key-value metadata of every completions file

_LIKELIEST = pa.struct([pa.field("token_id", pa.int32()), pa.field("logprob", pa.float32())])
LOGPROBS = pa.list_(  # an element for each token; what is told of it is `engine.sequence.TokenLogprobs`
    pa.field(
        "element",
        pa.struct(
            [
                pa.field("token_id", pa.int32()),
                pa.field("logprob", pa.float32()),
                pa.field("rank", pa.int32()),
                pa.field("top", pa.list_(pa.field("element", _LIKELIEST))),
            ]
        ),
    )
)

# Our columns, in the order in which they follow the kept input columns. Those in OPTIONAL are written only when asked for.
OUTPUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("shard", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
    pa.field("completion", pa.string()),
    pa.field("token_ids", pa.list_(pa.field("element", pa.int32()))),  # named as Parquet names it
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("num_prompt_tokens", pa.int32(), nullable=False),
    pa.field("num_completion_tokens", pa.int32(), nullable=False),
    pa.field("ttft_s", pa.float64()),
    pa.field("latency_s", pa.float64()),
    pa.field("replica", pa.string(), nullable=False),
    pa.field("step_first", pa.int64()),
    pa.field("step_last", pa.int64()),
    pa.field("logprobs", LOGPROBS),
    pa.field("prompt_logprobs", LOGPROBS),
)
OPTIONAL = ("token_ids", "logprobs", "prompt_logprobs")

# Why a row has no completion. A bad row is a row: finish_reason "error", one of these codes, and a sentence.
ERROR_CODES = (
    "null_prompt",  # the prompt, messages or token-id value is null
    "bad_prompt",  # text that is not valid Unicode
    "empty_prompt",  # no token at all, and the tokenizer has no token to begin with
    "prompt_too_long",
    "template_error",  # prompt_template or the chat template raised
    "bad_messages",  # not a list of {role, content}, or JSON text that is not
    "bad_token_ids",  # outside the vocabulary
    "bad_sampling",  # input.sampling_column: unknown key or value out of range
    "bad_grammar",  # json_schema, regex or choice: not valid, impossible, or beyond what can be followed to its end
    "bad_logits",  # the model's numbers overflowed for this row
    "killed_replica",  # alone in the engine, it ended its replica twice
)
# Those of a row that can never be a prompt, or not for this model: with the same request they come out the same again.
OF_THE_ROW = frozenset(ERROR_CODES) - {"bad_logits", "killed_replica"}


@dataclass(frozen=True)
class Shard:
    """One input Parquet file. `path` is relative to the input root, with forward slashes."""

    path: str
    size: int
    num_rows: int
    footer: str  # hex digest of the file's Parquet footer bytes: cheap evidence that the content is the same


@dataclass(frozen=True)
class RowRange:
    """Rows start (inclusive) to stop (exclusive) of shard number `shard`."""

    shard: int
    start: int
    stop: int


Unit = tuple[RowRange, ...]


def num_rows(unit: Unit) -> int:
    return sum(r.stop - r.start for r in unit)


BLOCK_ROWS = 32
ZEROS = "0" * 64  # as long as any hash


@dataclass(frozen=True)
class UnitFooter:
    """What a completions file says of itself; enough for `status` and `report` without reading a row."""

    schema_version: int
    unit: int
    generation: int
    rows: int  # of the input
    samples: int  # rows of the output: one for each sample of a row, one for a row that is an error
    prompt_tokens: int
    completion_tokens: int
    errors: dict[str, int]  # by code
    content_hash: str  # over the logical rows written
    input_hash: str  # over the logical rows read
    replica: str  # that wrote the file; each row says which replica made it
    versions: dict[str, Any] = field(default_factory=dict)  # of the replica
    fingerprint: str = ""  # of the run's request
    column_hashes: dict[str, str] = field(default_factory=dict)  # of each column alone, to say which one differs
    block_hashes: list[str] = field(default_factory=list)  # of each BLOCK_ROWS rows, to say where
    file_hash: str = ZEROS  # over all bytes of the file, with zeros in its own place
