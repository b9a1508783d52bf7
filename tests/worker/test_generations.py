"""A unit's next generation: good rows as they were, whatever their types, error rows made anew, and nothing damaged copied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.config import ConfigError, ExportConfig, from_dict
from batchinfer.data.reader import UnitReader, scan_shards
from batchinfer.data.results import RowResult
from batchinfer.data.schema import RowRange
from batchinfer.data.writer import DamagedFile, commit_unit, logical_hash, output_schema, read_rows, unit_footer, unit_table
from batchinfer.job.export import export
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.retry import Goal, begin, goals, is_complete, unfinished
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from batchinfer.worker.generations import Generations, pick_rows
from tests.data.test_writer import EVERYTHING


class Unit:
    """A run of one unit over the rows of a table, committed as a replica does it."""

    def __init__(self, folder: Path, inputs: pa.Table):
        pq.write_table(inputs, folder / "in.parquet", row_group_size=100)
        found = scan_shards([str(folder / "in.parquet")])
        self.config = from_dict(
            {"model": {"path": "/nowhere"}, "input": {"prompt_template": "x", "paths": [str(folder / "in.parquet")]}}
        )
        self.run_dir, self.schema = RunDir(folder / "run"), output_schema(found.schema, inputs.column_names, self.config)
        rows = (RowRange(0, 0, inputs.num_rows),)
        request = request_of(self.config, found.shards, found.schema)
        self.manifest = Manifest.create(self.run_dir, self.config, found, inputs.column_names, [rows], request)
        self.inputs = UnitReader(found.root, found.shards, inputs.column_names).read(rows)
        self.keys = [("in.parquet", row) for row in range(inputs.num_rows)]

    def commit(self, results: Sequence[Sequence[RowResult]], replica: str) -> pa.Table:
        generations = Generations(self.run_dir, goals(self.run_dir), "")
        earlier = generations.earlier(0, self.keys, self.inputs)
        table = unit_table(self.inputs, self.keys, results, self.config, replica, self.schema)
        table = table if earlier is None else earlier.merged(table, self.keys)
        origin = (replica, {}, self.manifest.fingerprint)
        footer = unit_footer(0, generations.of(0), self.inputs, table, "", *origin)
        commit_unit(self.run_dir, 0, footer.generation, table, footer, "zstd")
        self.run_dir.supersede()
        return table

    def read(self) -> pa.Table:
        with pq.ParquetFile(self.run_dir.completion(0, self.run_dir.done_units()[0])) as file:
            return read_rows(file)


def good(text: str, sample: int = 0) -> RowResult:
    return RowResult(3, text, [1, 2], "stop", ttft_s=0.1, latency_s=0.2, step_first=1, step_last=2, sample=sample)


def bad(code: str = "bad_logits", prompt_tokens: int = 3, sample: int = 0) -> RowResult:
    return RowResult(prompt_tokens, error=code, error_message="why", sample=sample)


def test_every_type_survives_a_retry_and_an_export(tmp_path: Path) -> None:
    unit = Unit(tmp_path, EVERYTHING)
    unit.commit([[good("first 0")], [bad()], [good("first 2")], [bad("null_prompt", 0)]], "r0")
    assert verify(unit.run_dir) == []
    assert begin(unit.run_dir, []) == {0: Goal(1, (), 2)}
    unit.commit([[], [good("then 1")], [], [good("then 3"), good("then 3b", 1)]], "r1")
    read = unit.read()
    kept = read.select(EVERYTHING.column_names)
    assert logical_hash(kept.slice(4)) == logical_hash(EVERYTHING.slice(3)), "both samples of a row have its columns"
    assert logical_hash(kept.slice(0, 4)) == logical_hash(EVERYTHING)
    assert kept.schema.equals(EVERYTHING.schema)
    assert read["completion"].to_pylist() == ["first 0", "then 1", "first 2", "then 3", "then 3b"]
    assert read["replica"].to_pylist() == ["r0", "r1", "r0", "r1", "r1"]
    assert unfinished(unit.run_dir) == {} and is_complete(unit.run_dir)
    export(unit.run_dir, tmp_path / "dest", ExportConfig())
    exported = pq.read_table(tmp_path / "dest" / "in.parquet")
    assert logical_hash(exported) == logical_hash(read) and exported.schema.equals(read.schema)
    with pytest.raises(ConfigError, match=r"export.format=jsonl: a value has no JSON \(Nanosecond"):
        export(unit.run_dir, tmp_path / "lines", ExportConfig(format="jsonl"))


def test_json_lines_of_every_type_that_has_one(tmp_path: Path) -> None:
    unit = Unit(tmp_path, EVERYTHING.drop_columns(["nanoseconds", "time", "deep"]))
    unit.commit([[good("text")] for _ in range(4)], "r0")
    export(unit.run_dir, tmp_path / "lines", ExportConfig(format="jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "lines" / "in.jsonl").read_text().splitlines()]
    assert [row["float"] for row in rows] == [1.5, None, None, None]
    assert rows[3]["map"] == [["b", None], ["c", 3]] and rows[0]["struct"] == {"a": 1, "b": ["x"]}


@pytest.mark.parametrize("nested", [False, True])
def test_dictionaries_that_differ_between_row_groups(tmp_path: Path, nested: bool) -> None:
    kind = pa.dictionary(pa.int8(), pa.string())
    chunks = [pa.array([f"{group} {i}" for i in range(100)]).cast(kind) for group in range(3)]
    if nested:
        chunks = [pa.StructArray.from_arrays([chunk], names=["x"]) for chunk in chunks]
    inputs = pa.table({"d": pa.chunked_array(chunks)})
    unit = Unit(tmp_path, inputs)
    unit.commit([[bad()] if i % 7 == 0 else [good("text")] for i in range(300)], "r0")
    begin(unit.run_dir, [])
    unit.commit([[good("text")] if i % 7 == 0 else [] for i in range(300)], "r1")
    assert unit.read()["d"].to_pylist() == inputs["d"].to_pylist()
    export(unit.run_dir, tmp_path / "dest", ExportConfig())
    assert pq.read_table(tmp_path / "dest" / "in.parquet")["d"].to_pylist() == inputs["d"].to_pylist()
    assert verify(unit.run_dir) == []


def test_which_rows_and_samples_are_wanted(tmp_path: Path) -> None:
    unit = Unit(tmp_path, pa.table({"id": range(5)}))
    rows = [
        [good("a"), bad(sample=1), bad("bad_grammar", 3, 2)],
        [bad("null_prompt", 0)],
        [good("b")],
        [bad("bad_grammar", 0)],
        [bad(), good("c", 1)],
    ]
    unit.commit(rows, "r0")

    def wanted(*codes: str) -> dict:
        earlier = Generations(unit.run_dir, {0: Goal(1, codes, 0)}, "").earlier(0, unit.keys, unit.inputs)
        assert earlier is not None
        return dict(earlier.wanted)

    assert wanted() == {0: [1, 2], 1: None, 3: None, 4: [0]}
    assert wanted("bad_logits") == {0: [1], 4: [0]}
    assert wanted("bad_grammar", "null_prompt") == {0: [2], 1: None, 3: None}
    begin(unit.run_dir, ["bad_logits"])
    unit.commit([[good("new", 1)], [], [], [], [good("new")]], "r1")
    found = [(row["row"], row["sample"], row["completion"], row["error"]) for row in unit.read().to_pylist()]
    assert found == [
        (0, 0, "a", None),
        (0, 1, "new", None),
        (0, 2, None, "bad_grammar"),
        (1, 0, None, "null_prompt"),
        (2, 0, "b", None),
        (3, 0, None, "bad_grammar"),
        (4, 0, "new", None),
        (4, 1, "c", None),
    ]


def test_nothing_damaged_is_copied_and_nothing_is_made_of_other_inputs(tmp_path: Path) -> None:
    unit = Unit(tmp_path, pa.table({"id": range(3)}))
    unit.commit([[good("a")], [bad()], [good("b")]], "r0")
    begin(unit.run_dir, [])
    generations = Generations(unit.run_dir, goals(unit.run_dir), "")
    with pytest.raises(RuntimeError, match="its input has changed since"):
        generations.earlier(0, unit.keys, pa.table({"id": [0, 1, 3]}))
    path = unit.run_dir.completion(0, 0)
    whole = bytearray(path.read_bytes())
    whole[50] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DamagedFile, match=r"000000\.0\.parquet: its bytes are not those that were written"):
        generations.earlier(0, unit.keys, unit.inputs)


def test_rows_are_picked_in_stretches() -> None:
    table = pa.concat_tables([pa.table({"x": [0, 1, 2]}), pa.table({"x": [3, 4]})])
    assert pick_rows(table, range(5)).equals(table) and pick_rows(table, range(5))["x"].num_chunks == 2
    assert pick_rows(table, [0, 2, 3, 1])["x"].to_pylist() == [0, 2, 3, 1]
