from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.config import ConfigError
from batchinfer.job.manifest import check_weights, hash_weights
from batchinfer.job.origins import not_compared
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from batchinfer.publish import temporary
from tests.job.runs import Keys, commit, commit_all, create, write_inputs


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return create(tmp_path, {})


@pytest.fixture
def done(run_dir: RunDir) -> RunDir:
    return commit_all(run_dir)


def recommit(run_dir: RunDir, unit: int, **how: Any) -> list[str]:
    run_dir.completion(unit, 0).unlink()
    commit(run_dir, unit, **how)
    return verify(run_dir)


def test_a_whole_run_is_clean(done: RunDir) -> None:
    assert verify(done) == []


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        verify(RunDir(tmp_path))


def test_missing_units_are_named_compactly(run_dir: RunDir) -> None:
    assert verify(run_dir) == ["units 0-3 missing: 13 of 13 rows"]
    commit(run_dir, 2)
    assert verify(run_dir) == ["units 0-1, 3 missing: 11 of 13 rows"]
    commit(run_dir, 0)
    commit(run_dir, 1)
    assert verify(run_dir) == ["unit 3 missing: 1 of 13 rows"]


def test_every_truncation_is_found_and_named(done: RunDir) -> None:
    path = done.completion(1, 0)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        (problem,) = verify(done)
        assert problem.startswith("completions/000001.0.parquet: cannot be read, torn or damaged (") and "\n" not in problem


@pytest.mark.parametrize("quick", [False, True])
def test_no_flipped_bit_goes_unnoticed(done: RunDir, quick: bool) -> None:
    """Anywhere in the file: pages, headers, statistics, the footer, the hash itself."""
    path = done.completion(1, 0)
    whole = path.read_bytes()
    for offset in range(0, len(whole), 61):
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        problems = verify(done, quick=quick)
        assert problems and all(problem.startswith("completions/000001.0.parquet: ") for problem in problems), offset


def test_a_damaged_column_is_named(done: RunDir) -> None:
    path = done.completion(1, 0)
    metadata = pq.read_metadata(path)
    column = metadata.row_group(0).column(metadata.schema.names.index("our_completion"))
    start = column.dictionary_page_offset or column.data_page_offset
    whole = bytearray(path.read_bytes())
    whole[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(whole)
    (problem,) = verify(done)
    assert problem.startswith("completions/000001.0.parquet: cannot be read, torn or damaged (column 'our_completion': ")


def test_swapped_files_are_named(done: RunDir) -> None:
    a, b = done.completion(0, 0), done.completion(2, 0)
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])
    for quick in (False, True):
        problems = verify(done, quick=quick)
        for name, said, right in (("000000", 2, 0), ("000002", 0, 2)):
            assert f"completions/{name}.0.parquet: its footer says unit {said}, it should be {right}" in problems


def test_a_file_of_another_run_is_named(done: RunDir, tmp_path: Path) -> None:
    other = commit_all(create(tmp_path / "other", {"max_tokens": 7}))
    shutil.copy(other.completion(1, 0), done.completion(1, 0))
    (problem,) = verify(done)
    assert problem.startswith("completions/000001.0.parquet: its footer says fingerprint ")


def test_an_edited_row_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.data.writer.BLOCK_ROWS", 2)
    monkeypatch.setattr("batchinfer.job.verify.BLOCK_ROWS", 2)
    run = commit_all(create(tmp_path, {}))
    path, footer = run.completion(1, 0), pq.read_metadata(run.completion(1, 0)).metadata[b"batchinfer"]
    table = pq.read_table(path)
    texts = table["our_completion"].to_pylist()
    texts[3] = texts[3].replace("t", "T")
    index = table.schema.get_field_index("our_completion")
    table = table.set_column(index, table.schema.field(index), pa.array(texts))
    pq.write_table(table.replace_schema_metadata({b"batchinfer": footer}), path)
    assert verify(run) == [
        "completions/000001.0.parquet: its rows are not those that were written: column 'our_completion' differs "
        "between row 7 of shard a.parquet and row 0 of shard b.parquet"
    ]


def test_a_changed_checkpoint_and_request_are_named(done: RunDir, tmp_path: Path) -> None:
    """Its path names a folder that was not there when the run was planned."""
    text = done.config_yaml.read_text()
    done.config_yaml.write_text(text.replace("seed: 0", "seed: 1", 1))
    assert verify(done) == ["config.yaml: seed is 1, and 0 in manifest.json"]
    done.config_yaml.write_text(text)
    assert verify(done, deep=True) == []
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + b"weights")
    raw = json.loads(done.manifest_json.read_bytes())
    raw["config"]["model"]["path"] = str(checkpoint)
    done.manifest_json.write_text(json.dumps(raw))
    done.config_yaml.write_text(text.replace("/nowhere", str(checkpoint)))
    check_weights(done, hash_weights(checkpoint))
    changed = "{}: the files in " + str(checkpoint) + " are not those that the run was planned with"
    expected = [changed.format("model.weights_headers"), changed.format("model.tokenizer")]
    assert verify(done, deep=True) == expected
    (checkpoint / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + b"WEIGHTS")
    assert verify(done) == expected, "only the full content tells"
    weights = f"weights: {checkpoint}/model.safetensors is not what the run was made with, or is not there"
    assert verify(done, deep=True) == [*expected, weights]


@pytest.mark.parametrize(
    "keys, problem",
    [
        (lambda k: [*k[:1], k[0], *k[2:]], ["row 5 of shard a.parquet appears twice", "row 6 of shard a.parquet is missing"]),
        (lambda k: k[:-1], ["row 1 of shard b.parquet is missing"]),
        (lambda k: k[:1], ["row 6 of shard a.parquet is missing (and so for 3 more rows)"]),
        (lambda k: [*k, k[-1]], ["row 1 of shard b.parquet appears twice"]),
        (lambda k: [k[0], k[2], k[1], *k[3:]], ["row 7 of shard a.parquet is out of order (and so for 1 more rows)"]),
        (lambda k: [*k, ("b.parquet", 2)], ["row 2 of shard b.parquet does not belong to this unit"]),
        (
            lambda k: [("a.parquet", 9), *k[1:]],
            ["row 5 of shard a.parquet is missing", "row 9 of shard a.parquet does not belong to this unit"],
        ),
    ],
)
def test_the_row_at_fault_is_named(done: RunDir, keys: Callable[[Keys], Keys], problem: list[str]) -> None:
    assert recommit(done, 1, keys=keys) == [f"completions/000001.0.parquet: {line}" for line in problem]


def moved(*indices: int) -> Callable[[pa.Table], pa.Table]:
    """The output rows of a unit in another order, some of them doubled or left out."""
    return lambda table: table.take(list(indices))


# Unit 1 is rows 5-7 of a.parquet and 0-1 of b.parquet, and the first of them is an error: output rows 0 | 1 2 | 3 4 | 5 6 | 7 8
# where each asks for two samples, and 0 | 1 | 2 3 | 4 | 5 6 where the rows ask for 3, 1, 2, 1 and 2.
@pytest.mark.parametrize(
    ("asked", "change", "problem"),
    [
        ("run", moved(0, 1, 2, 3, 4, 5, 6, 7, 8), None),
        ("run", moved(0, 1, 3, 4, 5, 6, 7, 8), "row 6 of shard a.parquet, sample 1, is missing"),
        ("run", moved(0, 2, 3, 4, 5, 6, 7, 8), "row 6 of shard a.parquet is missing"),
        ("run", moved(0, 1, 2, 2, 3, 4, 5, 6, 7, 8), "row 6 of shard a.parquet, sample 1, appears twice"),
        ("run", moved(0, 2, 1, 3, 4, 5, 6, 7, 8), "row 6 of shard a.parquet, sample 1, is out of order (and so for 1 more rows)"),
        ("run", moved(0, 1, 3, 2, 4, 5, 6, 7, 8), "row 7 of shard a.parquet is out of order (and so for 1 more rows)"),
        ("run", moved(1, 2, 3, 4, 5, 6, 7, 8), "row 5 of shard a.parquet is missing (and so for 1 more rows)"),
        ("rows", moved(0, 1, 2, 3, 4, 5, 6), None),
        ("rows", moved(0, 1, 2, 4, 5, 6), "row 7 of shard a.parquet, sample 1, is missing"),
        ("rows", moved(0, 1, 2, 3, 4, 4, 5, 6), "row 0 of shard b.parquet appears twice"),
        ("rows", moved(0, 1, 3, 2, 4, 5, 6), "row 7 of shard a.parquet, sample 1, is out of order (and so for 1 more rows)"),
    ],
)
def test_the_sample_at_fault_is_named(tmp_path: Path, asked: str, change: Any, problem: str | None) -> None:
    """Though the file's hash is right."""
    run = commit_all(create(tmp_path, {"n": 2}) if asked == "run" else create(tmp_path, {"n": 7}, "how"))
    assert verify(run) == []
    run.completion(1, 0).unlink()
    commit(run, 1, change=change, rehash=True)
    said = [line.removeprefix("completions/000001.0.parquet: ") for line in verify(run)]
    assert [line for line in said if not line.startswith("its footer says")] == ([problem] if problem else [])
    assert (not said) == (problem is None)


def test_samples_that_rows_asked_for_without_the_input(tmp_path: Path) -> None:
    run = commit_all(create(tmp_path, {}, "how"))
    shutil.rmtree(tmp_path / "data")
    assert verify(run) == []


def test_values_changed_after_the_hash_was_taken(done: RunDir) -> None:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index("our_completion")
        return table.set_column(index, table.schema.field(index), pa.array(["other"] * len(table)))

    assert recommit(done, 1, change=change) == [
        "completions/000001.0.parquet: its rows are not those that were written: column 'our_completion' differs "
        "between row 5 of shard a.parquet and row 1 of shard b.parquet"
    ]


def test_input_columns_of_other_rows_are_found(done: RunDir) -> None:
    (problem,) = recommit(done, 2, said={"input_hash": "0"})
    assert "its input is not what was read when it was made: rows of b.parquet have changed" in problem
    path = done.completion(2, 0)
    path.unlink()
    shutil.copy(done.completion(0, 0), path)
    problems = verify(done)
    assert "completions/000002.0.parquet: its footer says unit 0, it should be 2" in problems
    assert "completions/000002.0.parquet: row 2 of shard b.parquet is missing (and so for 1 more rows)" in problems


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.drop_columns(["our_error"]), "column 'our_error_message: string' stands where 'our_error: string' belongs"),
        (lambda t: t.drop_columns(["our_step_last"]), "column 'our_step_last: int64' is missing"),
        (lambda t: t.append_column("more", t["id"]), "column 'more: int16' does not belong"),
        (lambda t: t.set_column(0, "id", t["id"].cast(pa.int64())), "column 'id: int64' stands where 'id: int16' belongs"),
    ],
)
def test_a_wrong_schema(done: RunDir, change: Callable[[pa.Table], pa.Table], problem: str) -> None:
    assert recommit(done, 1, change=change) == [f"completions/000001.0.parquet: {problem}"]


@pytest.mark.parametrize(
    "name, value, right",
    [
        ("prompt_tokens", 1, 12),
        ("completion_tokens", 1, 8),
        ("rows", 6, 5),
        ("samples", 6, 5),
        ("unit", 2, 1),
        ("generation", 1, 0),
        ("schema_version", 0, 3),
        ("errors", {}, {"null_prompt": 1}),
    ],
)
def test_footer_totals(done: RunDir, name: str, value: Any, right: Any) -> None:
    expected = f"completions/000001.0.parquet: its footer says {name} {value}, it should be {right}"
    assert recommit(done, 1, said={name: value}) == [expected]


def test_foreign_files(done: RunDir) -> None:
    (done.completions / "notes.txt").touch()
    (done.completions / "42.0.parquet").touch()
    shutil.copy(done.completion(0, 0), done.completion(9, 0))
    temporary(done.completion(0, 1)).touch()  # a killed writer's: nobody's problem
    assert verify(done) == [
        "completions/000009.0.parquet: this run has no unit 9, only 4 units",
        "completions/42.0.parquet: not the name of a completions file",
        "completions/notes.txt: not the name of a completions file",
    ]


def test_the_highest_generation_counts(done: RunDir) -> None:
    commit(done, 1, generation=1)
    assert verify(done) == [], "the lower one is a crash's remnant"
    done.completion(1, 0).write_bytes(b"")
    assert verify(done) == []
    done.completion(1, 1).write_bytes(b"")
    assert [problem[:28] for problem in verify(done)] == ["completions/000001.1.parquet"]


def test_changed_inputs_are_named_once_per_file_and_absent_ones_left_alone(done: RunDir, tmp_path: Path) -> None:
    write_inputs(tmp_path / "data", "PROMPT changed")
    assert not_compared(done) is None
    problems = verify(done)
    assert [p.partition(":")[0] for p in problems] == ["input shard a.parquet", "input shard b.parquet"]
    assert all("has changed since the run was planned" in problem for problem in problems)
    shutil.rmtree(tmp_path / "data")
    assert verify(done) == []
    assert "input shards are not there any more" in str(not_compared(done))
