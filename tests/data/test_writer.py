"""Output tables: every input value and type survives, the hash sees values and nothing else, a unit is committed once."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import itertools
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.config import Config, OutputConfig, SamplingConfig
from batchinfer.data.reader import UnitReader, scan_shards
from batchinfer.data.results import Logprobs, RowResult, logprobs_column
from batchinfer.data.schema import LOGPROBS, OUTPUT_FIELDS, RowRange
from batchinfer.data.writer import (
    commit_unit,
    file_hash,
    logical_hash,
    output_schema,
    read_footer,
    repeat_rows,
    unit_footer,
    unit_table,
)
from batchinfer.engine.sequence import TokenLogprobs
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published

ZONED = pa.timestamp("ns", "Europe/Berlin")
DEEP = pa.list_(pa.struct([("k", pa.list_(pa.binary())), ("t", ZONED)]))
COLUMNS: dict[str, pa.Array] = {
    "text": pa.array(["a", None, "", "déjà 你好"]),
    "large text": pa.array(["a", None, "", "b" * 99], pa.large_string()),
    "view": pa.array(["a", None, "", "longer than twelve bytes"], pa.string_view()),
    "binary view": pa.array([b"a", None, b"", b"\xff longer than twelve bytes"], pa.binary_view()),
    "dictionary": pa.array(["x", None, "y", "x"]).dictionary_encode(),
    "small dictionary": pa.array(["x", None, "y", "x"]).cast(pa.dictionary(pa.int8(), pa.string())),
    "integers": pa.array([1, None, -3, 2**40]),
    "half": pa.array([1.5, None, -0.0, 3.0], pa.float16()),
    "float": pa.array([1.5, None, float("nan"), float("inf")]),
    "flag": pa.array([True, None, False, True]),
    "nothing": pa.nulls(4),
    "nanoseconds": pa.array([1, None, 10**18 + 1, -5], ZONED),
    "microseconds": pa.array([1, None, 10**15 + 1, -5], pa.timestamp("us")),
    "date": pa.array([1, None, 3, 4], pa.date32()),
    "time": pa.array([1, None, 3, 4], pa.time64("ns")),
    "duration": pa.array([1, None, 3, 4], pa.duration("us")),
    "decimal": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-3.00"), decimal.Decimal(0)], pa.decimal128(20, 2)),
    "wide decimal": pa.array([decimal.Decimal("1.25"), None, None, decimal.Decimal(0)], pa.decimal256(50, 2)),
    "fixed": pa.array([b"ab", None, b"cd", b"ef"], pa.binary(2)),
    "list": pa.array([[1, 2], None, [], [None, 3]]),
    "large list": pa.array([["a"], None, [], [None, "b"]], pa.large_list(pa.large_string())),
    "pair": pa.array([[1, 2], None, [3, None], [5, 6]], pa.list_(pa.int16(), 2)),
    "map": pa.array([[("a", 1)], None, [], [("b", None), ("c", 3)]], pa.map_(pa.string(), pa.int8())),
    "struct": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}, {"a": 4, "b": []}]),
    "deep": pa.array([[{"k": [b"x"], "t": 1}], None, [], [None]], DEEP),
}
EVERYTHING = pa.table(COLUMNS)


Results = list[list[RowResult]]


def results_for(rows: int) -> Results:
    good = RowResult(3, "text", [1, 2], "stop", ttft_s=0.1, latency_s=0.2, step_first=1, step_last=2)
    bad = RowResult(error="null_prompt", error_message="the prompt is null")
    return [[bad if i % 3 == 1 else good] for i in range(rows)]


def round_trip(
    tmp_path: Path,
    inputs: pa.Table,
    compression: str = "zstd",
    results: Results | None = None,
    sampling: SamplingConfig | None = None,
    **output: object,
) -> tuple[pa.Table, pa.Table]:
    """(what was to be written, what the committed file holds)"""
    config = Config(output=OutputConfig(**output), sampling=sampling or SamplingConfig())  # type: ignore[arg-type]
    run_dir = RunDir(tmp_path / "s3:" / "run #1 %20 'é'")
    run_dir.create()
    schema = output_schema(inputs.schema, inputs.column_names, config)
    results = results or results_for(inputs.num_rows)
    keys = [("a shard.parquet", i) for i in range(inputs.num_rows)]
    table = unit_table(inputs, keys, results, config, "host.0", schema)
    footer = unit_footer(5, 0, inputs, table, config.output.prefix, "host.0", {"batchinfer": "0"})
    assert commit_unit(run_dir, 5, 0, table, footer, compression) is Published.WON
    sealed = dataclasses.replace(footer, file_hash=file_hash(run_dir.completion(5, 0)))
    assert read_footer(run_dir.completion(5, 0)) == sealed
    return table, pq.read_table(run_dir.completion(5, 0))


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "lz4", "none"])
def test_all_compressions_are_readable(tmp_path: Path, compression: str) -> None:
    _, read = round_trip(tmp_path, pa.table({"p": ["a", "b"]}), compression)
    assert read["p"].to_pylist() == ["a", "b"]


def test_every_type_survives_the_whole_way(tmp_path: Path) -> None:
    pq.write_table(EVERYTHING, tmp_path / "in.parquet", row_group_size=3)
    found = scan_shards([str(tmp_path / "in.parquet")])
    reader = UnitReader(found.root, found.shards, EVERYTHING.column_names)
    inputs = reader.read((RowRange(0, 0, 4),))
    written, read = round_trip(tmp_path, inputs)
    for name in EVERYTHING.column_names:
        assert read.schema.field(name).type == EVERYTHING.schema.field(name).type, name
    kept = read.select(EVERYTHING.column_names)
    assert logical_hash(kept) == logical_hash(EVERYTHING)
    comparable = [name for name in kept.column_names if name != "float"]  # NaN is not equal to itself
    assert kept.select(comparable).equals(EVERYTHING.select(comparable))
    assert logical_hash(read) == logical_hash(written)


@pytest.mark.parametrize("nested", [False, True])
def test_dictionaries_that_differ_between_chunks_stay_readable(tmp_path: Path, nested: bool) -> None:
    kind = pa.dictionary(pa.int8(), pa.string())  # what pandas makes of a category; 300 values have no common one
    chunks = [pa.array([f"{group} {i}" for i in range(100)]).cast(kind) for group in range(3)]
    if nested:
        chunks = [pa.StructArray.from_arrays([chunk], names=["x"]) for chunk in chunks]
    inputs = pa.table({"d": pa.chunked_array(chunks)})
    written, read = round_trip(tmp_path, inputs)
    assert read["d"].to_pylist() == inputs["d"].to_pylist() and read["d"].type == inputs["d"].type
    assert logical_hash(read) == logical_hash(written)


def test_our_columns(tmp_path: Path) -> None:
    _, read = round_trip(tmp_path, pa.table({"p": ["a", "b"], "row": [7, 8]}), prefix="our_", token_ids=True)
    always = [field.name for field in OUTPUT_FIELDS if "logprobs" not in field.name]
    assert read.column_names == ["p", "row", *(f"our_{name}" for name in always)]
    good, bad = read.to_pylist()
    assert good["our_shard"] == "a shard.parquet" and good["our_row"] == 0 and good["our_sample"] == 0
    assert good["our_completion"] == "text" and good["our_token_ids"] == [1, 2] and good["our_num_completion_tokens"] == 2
    assert bad["our_completion"] is None and bad["our_token_ids"] is None and bad["our_finish_reason"] == "error"
    assert bad["our_error"] == "null_prompt" and bad["our_num_completion_tokens"] == 0 and bad["row"] == 8


def test_token_ids_only_when_asked() -> None:
    assert "token_ids" not in output_schema(pa.schema([]), [], Config()).names
    assert "token_ids" in output_schema(pa.schema([]), [], Config(output=OutputConfig(token_ids=True))).names


def samples(*errors: str | None) -> list[RowResult]:
    return [
        RowResult(3, "text", [1, 2], "error" if error else "stop", error, sample=k, step_first=k)
        for k, error in enumerate(errors)
    ]


def test_samples_of_a_row_are_next_to_each_other_with_its_columns(tmp_path: Path) -> None:
    results = [samples(None, None, None), [RowResult(error="null_prompt")], samples(None, "bad_grammar"), samples(None)]
    written, read = round_trip(tmp_path, EVERYTHING, results=results)
    assert logical_hash(read) == logical_hash(written)
    assert read["row"].to_pylist() == [0, 0, 0, 1, 2, 2, 3] and read["sample"].to_pylist() == [0, 1, 2, 0, 0, 1, 0]
    assert read["error"].to_pylist() == [None, None, None, "null_prompt", None, "bad_grammar", None]
    parts = pa.concat_tables([EVERYTHING.slice(row, 1) for row in (0, 0, 0, 1, 2, 2, 3)])
    assert logical_hash(read.select(EVERYTHING.column_names)) == logical_hash(parts)
    footer = read_footer(RunDir(tmp_path / "s3:" / "run #1 %20 'é'").completion(5, 0))
    assert (footer.rows, footer.samples, footer.prompt_tokens, footer.completion_tokens) == (4, 7, 18, 12)
    assert footer.errors == {"bad_grammar": 1, "null_prompt": 1}


@pytest.mark.parametrize("max_bytes", [1, 500, 2**30])
def test_rows_are_repeated_in_order_in_chunks_of_bounded_size(max_bytes: int) -> None:
    chunked = pa.concat_tables([EVERYTHING, EVERYTHING.slice(1), EVERYTHING.slice(0, 0)])
    counts = [3, 1, 0, 2, 1, 5, 1]
    wanted = pa.concat_tables([chunked.slice(i, 1) for i, count in enumerate(counts) for _ in range(count)])
    found = repeat_rows(chunked, counts, max_bytes)
    assert found.schema == chunked.schema and logical_hash(found) == logical_hash(wanted)
    assert (len(found.column(0).chunks) == 2) == (max_bytes == 2**30)
    assert repeat_rows(chunked, [1] * 7) is chunked


def told(token_id: int, k: int) -> TokenLogprobs:
    """Numbers that float32 has."""
    return TokenLogprobs(token_id, -token_id / 4, token_id + 1, [(token_id + i, -i / 8) for i in range(k)])


def as_python(token: TokenLogprobs | None) -> dict[str, object] | None:
    if token is None:
        return None
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top]
    return {"token_id": token.token_id, "logprob": token.logprob, "rank": token.rank, "top": top}


TOLD = st.none() | st.lists(st.none() | st.builds(told, st.integers(0, 99), st.integers(0, 3)), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(TOLD, max_size=6))
def test_logprobs_column_holds_what_it_was_told(rows: list[list[TokenLogprobs | None] | None]) -> None:
    kept = [None if row is None else Logprobs() for row in rows]
    for logprobs, row in zip(kept, rows, strict=True):
        if logprobs is not None and row is not None:
            logprobs.extend(row[:2])
            logprobs.extend(row[2:])
            assert len(logprobs) == len(row)
    column = logprobs_column(kept)
    column.validate(full=True)
    plain = pa.array([None if row is None else [as_python(token) for token in row] for row in rows], LOGPROBS)
    assert column.type == LOGPROBS and column.equals(plain)
    assert logical_hash(pa.table({"a": column})) == logical_hash(pa.table({"a": plain}))


def test_logprobs_columns_survive_the_whole_way(tmp_path: Path) -> None:
    first, second, prompt = Logprobs(), Logprobs(), Logprobs()
    first.extend([told(1, 2), told(2, 2)])
    second.extend([told(3, 0), told(4, 0)])
    prompt.extend([None, told(5, 1), told(6, 1)])
    one = [
        RowResult(3, "a", [1, 2], "stop", logprobs=first, prompt_logprobs=prompt),
        RowResult(3, "b", [3, 4], "stop", sample=1, logprobs=second),
        RowResult(3, None, [3, 4], "error", "bad_grammar", sample=2, logprobs=second),
    ]
    both = SamplingConfig(logprobs=2, prompt_logprobs=1)
    written, read = round_trip(tmp_path, pa.table({"p": ["x", None]}), "zstd", [one, [RowResult(error="null_prompt")]], both)
    assert read.column_names[-2:] == ["logprobs", "prompt_logprobs"] and read["logprobs"].type == LOGPROBS
    tokens, prompts = read["logprobs"].to_pylist(), read["prompt_logprobs"].to_pylist()
    assert tokens == [[as_python(told(i, 2)) for i in (1, 2)], [as_python(told(i, 0)) for i in (3, 4)], None, None]
    whole = [None, as_python(told(5, 1)), as_python(told(6, 1))]
    assert prompts == [whole, whole, None, None], "samples of a row have one prompt"
    assert logical_hash(read) == logical_hash(written)
    assert pq.ParquetFile(next((tmp_path / "s3:").rglob("*.parquet"))).schema.names[-5:] == [
        "token_id", "logprob", "rank", "token_id", "logprob"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        (SamplingConfig(), []),
        (SamplingConfig(logprobs=0), ["logprobs"]),
        (SamplingConfig(prompt_logprobs=0), ["prompt_logprobs"]),
    ],
)
def test_logprobs_only_when_asked(sampling: SamplingConfig, names: list[str]) -> None:
    found = output_schema(pa.schema([]), [], Config(sampling=sampling)).names
    assert [name for name in found if "logprobs" in name] == names


def test_field_metadata_and_nullability_are_kept(tmp_path: Path) -> None:
    field = pa.field("p", pa.string(), nullable=False, metadata={"unit": "words"})
    _, read = round_trip(tmp_path, pa.table({"p": ["a"]}, schema=pa.schema([field])))
    assert read.schema.field("p").equals(field) and read.schema.field("p").metadata[b"unit"] == b"words"


def test_the_second_commit_of_a_unit_loses_and_leaves_nothing(tmp_path: Path) -> None:
    round_trip(tmp_path, pa.table({"p": ["first"]}))
    run_dir = RunDir(tmp_path / "s3:" / "run #1 %20 'é'")
    footer = read_footer(run_dir.completion(5, 0))
    assert commit_unit(run_dir, 5, 0, pa.table({"p": ["second"]}), footer, "zstd") is Published.LOST
    assert [path.name for path in run_dir.completions.iterdir()] == ["000005.0.parquet"]
    assert pq.read_table(run_dir.completion(5, 0))["p"].to_pylist() == ["first"]


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    round_trip(tmp_path, pa.table({"p": ["first"]}))
    path = RunDir(tmp_path / "s3:" / "run #1 %20 'é'").completion(5, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000005\.0\.parquet.*not a whole completions file"):
        read_footer(path)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "t": st.none() | st.text(max_size=5),
            "n": st.none() | st.integers(-5, 5),
            "l": st.none() | st.lists(st.none() | st.fixed_dictionaries({"a": st.none() | st.booleans()}), max_size=3),
        }
    ),
    max_size=12,
)
SCHEMA = pa.schema([("t", pa.string()), ("n", pa.int64()), ("l", pa.list_(pa.struct([("a", pa.bool_())])))])


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, cuts=st.lists(st.integers(0, 12), max_size=4), pad=st.integers(0, 3))
def test_hash_ignores_chunks_and_slices(rows: list[dict[str, object]], cuts: list[int], pad: int) -> None:
    whole = pa.Table.from_pylist(rows, SCHEMA)
    padded = pa.concat_tables([whole.slice(0, pad), whole, whole]).combine_chunks().slice(whole.slice(0, pad).num_rows, len(rows))
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    chunked = pa.concat_tables([padded.slice(a, b - a) for a, b in itertools.pairwise(edges)])
    assert logical_hash(chunked) == logical_hash(padded) == logical_hash(whole)


@settings(max_examples=150, deadline=None)
@given(left=ROWS, right=ROWS)
def test_hash_is_equal_only_for_equal_rows(left: list[dict[str, object]], right: list[dict[str, object]]) -> None:
    hashes = [logical_hash(pa.Table.from_pylist(rows, SCHEMA)) for rows in (left, right)]
    assert (hashes[0] == hashes[1]) == (left == right)


@pytest.mark.parametrize("name", EVERYTHING.column_names)
def test_hash_of_every_type_sees_order_and_not_slices(name: str) -> None:
    table = EVERYTHING.select([name])
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 2), table.slice(3)])
    assert logical_hash(pieces) == logical_hash(table)
    assert logical_hash(table.slice(1, 2)) == logical_hash(pa.concat_tables([table, table]).slice(5, 2))
    if name != "nothing":
        backwards = pa.concat_tables([table.slice(i, 1) for i in (3, 2, 1, 0)])
        assert logical_hash(backwards) != logical_hash(table)


def test_hash_ignores_values_under_nulls() -> None:
    under = pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(b"\x07" * 16)])
    assert logical_hash(pa.table({"a": under})) == logical_hash(pa.table({"a": pa.array([under[0].as_py(), None])}))
    text = pa.Array.from_buffers(
        pa.string(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x03\0\0\0"), pa.py_buffer(b"abc")]
    )
    assert text.to_pylist() == ["a", None]
    assert logical_hash(pa.table({"a": text})) == logical_hash(pa.table({"a": ["a", None]}))
    nested = pa.StructArray.from_arrays([under], names=["x"], mask=pa.array([True, False]))
    same = pa.array([None, {"x": None}], nested.type)
    assert logical_hash(pa.table({"a": nested})) == logical_hash(pa.table({"a": same}))


def test_hash_ignores_dictionaries_and_sees_types_names_and_nulls() -> None:
    texts = pa.array(["x", None, "x"])
    shuffled = pa.DictionaryArray.from_arrays(pa.array([1, None, 1], pa.int8()), pa.array(["unused", "x"]))
    null_value = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["x", None]))
    reference = logical_hash(pa.table({"a": texts}))
    for same in (texts.dictionary_encode(), shuffled, null_value):
        assert logical_hash(pa.table({"a": same})) == reference
    others = [
        pa.table({"b": texts}),
        pa.table({"a": texts.cast(pa.large_string())}),
        pa.table({"a": ["x", "", "x"]}),
        pa.table({"a": ["x", None, "x", None]}),
        pa.table({"a": [None, "x", "x"]}),
        pa.table({"a": texts, "c": texts}),
    ]
    assert len({logical_hash(other) for other in others} | {reference}) == len(others) + 1
    lists = [[[1], [2]], [[1, 2], []], [[], [1, 2]], [[1, 2], None]]
    assert len({logical_hash(pa.table({"a": pa.array(value, pa.list_(pa.int64()))})) for value in lists}) == len(lists)


def test_hash_is_fast() -> None:
    rows = 100_000
    table = pa.table(
        {
            "a": [f"prompt number {i} of many" for i in range(rows)],
            "b": range(rows),
            "c": [None if i % 7 == 0 else f"{i}" for i in range(rows)],
            "d": [[i, i + 1] for i in range(rows)],
            "e": [{"x": i, "y": "z"} for i in range(rows)],
            "f": [i * 0.5 for i in range(rows)],
            "g": pa.array([f"{i % 9}" for i in range(rows)]).dictionary_encode(),
            "h": [datetime.date(2024, 1, 1 + i % 28) for i in range(rows)],
        }
    )
    started = time.perf_counter()
    logical_hash(table)
    assert time.perf_counter() - started < 1.5
