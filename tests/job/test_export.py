"""`export`: a file for each shard, in input order, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.config import ConfigError, ExportConfig
from batchinfer.data.reader import UnitReader, scan_shards
from batchinfer.data.results import RowResult
from batchinfer.data.schema import RowRange
from batchinfer.data.writer import commit_unit, output_schema, unit_footer, unit_table
from batchinfer.job import export as export_module
from batchinfer.job.export import Exported, ExportFailed, export
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.rundir import RunDir
from batchinfer.publish import temporary
from tests.job.runs import commit, commit_all, config_of, create

PARQUET = ExportConfig()


@pytest.fixture
def done(tmp_path: Path) -> RunDir:
    """Rows with 1 to 3 samples, of which the first of each unit is an error."""
    return commit_all(create(tmp_path, {}, "how"))


def read(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_for_each_shard_in_input_order(done: RunDir, tmp_path: Path) -> None:
    dest = tmp_path / "new" / "dest"
    assert export(done, dest, PARQUET) == Exported(files=2, rows=13, samples=19)
    assert files(dest) == ["a.parquet", "b.parquet"]
    whole = pa.concat_tables([read(done.completion(unit, 0)) for unit in range(4)])
    for shard, rows in (("a", 8), ("b", 5)):
        found = read(dest / f"{shard}.parquet")
        expected = whole.filter(pa.compute.equal(whole["our_shard"], f"{shard}.parquet"))
        assert found.equals(expected), "all columns, and several samples of a row in their order"
        assert found.schema.equals(read(done.completion(0, 0)).schema)
        assert sorted(set(found["our_row"].to_pylist())) == list(range(rows))
        assert pq.read_metadata(dest / f"{shard}.parquet").metadata[b"batchinfer.fingerprint"]
    assert [path.name for path in dest.parent.iterdir()] == ["dest"]


def test_row_groups_are_cut_by_size(done: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "GROUP_ROWS", 4)
    monkeypatch.setattr(export_module, "BATCH_ROWS", 3)
    export(done, tmp_path / "dest", PARQUET)
    metadata = pq.read_metadata(tmp_path / "dest" / "a.parquet")
    assert metadata.num_row_groups > 2 and all(metadata.row_group(i).num_rows < 8 for i in range(metadata.num_row_groups))


def test_memory_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 units of 4 MB, row groups of 1 MB: what is held at once is a few of them."""
    run_dir = large_run(tmp_path, units=16, rows=64, characters=64 << 10)
    monkeypatch.setattr(export_module, "GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(export_module, "BATCH_ROWS", 8)
    before, held, real = pa.total_allocated_bytes(), [], export_module._Parquet.write

    def write(sink: export_module._Parquet, batch: pa.RecordBatch) -> None:
        real(sink, batch)
        held.append(pa.total_allocated_bytes() - before)

    monkeypatch.setattr(export_module._Parquet, "write", write)
    assert export(run_dir, tmp_path / "dest", PARQUET).rows == 16 * 64
    assert len(held) == 128 and max(held) < 16 << 20, "64 MB in all"


def large_run(folder: Path, units: int, rows: int, characters: int) -> RunDir:
    data, run_dir, names = folder / "data", RunDir(folder / "run"), ["id", "prompt", "how"]
    data.mkdir()
    texts = [os.urandom(characters // 2).hex() for _ in range(rows)]
    ids = pa.array(range(units * rows), pa.int16())
    table = pa.table({"id": ids, "prompt": texts * units, "how": ["{}"] * (units * rows)})
    pq.write_table(table, data / "a.parquet", row_group_size=rows)
    inputs, config = scan_shards([str(data)]), config_of(data, {})
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, keep_columns="all"))
    ranges = [(RowRange(0, rows * i, rows * i + rows),) for i in range(units)]
    manifest = Manifest.create(run_dir, config, inputs, names, ranges, request_of(config, inputs.shards, inputs.schema))
    results = [[RowResult(3, "text", [1], "stop")]] * rows
    for number, unit in enumerate(ranges):
        read_in = UnitReader(inputs.root, inputs.shards, names).read(unit)
        keys = [("a.parquet", rows * number + i) for i in range(rows)]
        table = unit_table(read_in, keys, results, config, "r0", output_schema(inputs.schema, names, config))
        footer = unit_footer(number, 0, read_in, table, "our_", "r0", {}, manifest.fingerprint)
        commit_unit(run_dir, number, 0, table, footer, "none")
    return run_dir


def test_json_lines(done: RunDir, tmp_path: Path) -> None:
    export(done, tmp_path / "dest", ExportConfig(format="jsonl"))
    assert files(tmp_path / "dest") == ["a.jsonl", "b.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "dest" / "a.jsonl").read_text().splitlines()]
    whole = pa.concat_tables([read(done.completion(unit, 0)) for unit in range(4)]).to_pylist()
    assert rows == [row for row in whole if row["our_shard"] == "a.parquet"]


def test_values_that_json_does_not_know() -> None:
    import datetime
    import decimal

    row = {
        "bytes": b"\xff",
        "day": datetime.date(2026, 1, 2),
        "money": decimal.Decimal("1.10"),
        "time": datetime.timedelta(seconds=90),
        "logprobs": [{"logprob": float("-inf"), "rank": 1}],
        "text": "é",
    }
    assert export_module._json_line(row).decode() == (
        '{"bytes": "/w==", "day": "2026-01-02", "money": "1.10", "time": 90.0, "logprobs": [{"logprob": null, "rank": 1}],'
        ' "text": "é"}\n'
    )


def test_shards_keep_their_folders_and_empty_ones_their_files(tmp_path: Path) -> None:
    """And one that `input.limit` never reached has none."""
    data, run_dir = tmp_path / "data", RunDir(tmp_path / "run")
    for name, rows in (("x/a", 2), ("x/deep/b", 0), ("y/a", 3), ("z", 1)):
        path = data / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"id": pa.array(range(rows), pa.int16())}
        columns |= {name: pa.array(["{}"] * rows, pa.string()) for name in ("prompt", "how")}
        table = pa.table(columns)
        pq.write_table(table, path)
    inputs, config = scan_shards([str(data)]), config_of(data, {})
    units = ((RowRange(0, 0, 2), RowRange(2, 0, 1)), (RowRange(2, 1, 3),))
    Manifest.create(run_dir, config, inputs, ["id"], units, request_of(config, inputs.shards, inputs.schema))
    shutil.copy(data / "x" / "a.parquet", data / "a.parquet")  # where the helper looks for the schema
    for unit in range(2):
        commit(run_dir, unit)
    assert export(run_dir, tmp_path / "dest", PARQUET) == Exported(files=3, rows=5, samples=5)
    assert files(tmp_path / "dest") == ["x/a.parquet", "x/deep/b.parquet", "y/a.parquet"]
    assert read(tmp_path / "dest" / "y" / "a.parquet")["our_row"].to_pylist() == [0, 1, 2]
    empty = read(tmp_path / "dest" / "x" / "deep" / "b.parquet")
    assert len(empty) == 0 and empty.schema.names == read(run_dir.completion(0, 0)).schema.names


def test_refused_destinations(done: RunDir, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    inside = done.root / "dest"
    (tmp_path / "link").symlink_to(done.root)
    for dest, sentence in (
        (full, "is not empty"),
        (full / "file", "is a file"),
        (inside, "lies inside the run"),
        (tmp_path / "link" / "dest", "lies inside the run"),
        (done.root, "lies inside the run"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            export(done, dest, PARQUET)
    assert files(full) == ["file"] and not inside.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    export(done, empty, PARQUET)
    assert files(empty) == ["a.parquet", "b.parquet"]


def test_missing_rows_are_refused_unless_asked_for(done: RunDir, tmp_path: Path) -> None:
    done.completion(1, 0).unlink()
    with pytest.raises(ConfigError, match="5 rows are missing; finish them with: "):
        export(done, tmp_path / "dest", PARQUET)
    exported = export(done, tmp_path / "dest", ExportConfig(incomplete=True))
    assert (exported.files, exported.rows) == (2, 8)
    assert sorted(set(read(tmp_path / "dest" / "b.parquet")["our_row"].to_pylist())) == [2, 3, 4]
    for unit in (0, 2, 3):
        done.completion(unit, 0).unlink()
    with pytest.raises(ConfigError, match="no row is committed"):
        export(done, tmp_path / "other", ExportConfig(incomplete=True))


def test_damage_is_never_handed_on(done: RunDir, tmp_path: Path) -> None:
    path = done.completion(1, 0)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"000001\.0\.parquet"):
        export(done, tmp_path / "dest", PARQUET)
    path.unlink()
    commit(done, 1, change=lambda table: table.slice(3), rehash=True)
    with pytest.raises(ExportFailed, match=r"2 rows of b.parquet|rows of a.parquet are there, it should be 8"):
        export(done, tmp_path / "dest", PARQUET)
    path.unlink()
    commit(done, 1, change=lambda table: table.take([1, 0, *range(2, len(table))]), rehash=True)
    with pytest.raises(ExportFailed, match=r"rows of a\.parquet are out of order or doubled"):
        export(done, tmp_path / "dest", PARQUET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"], "nothing is left of them"


def test_a_retry_that_commits_meanwhile_changes_nothing(done: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export_module._open_whole

    def replaced_first(path: Path) -> pq.ParquetFile:
        if not done.completion(2, 1).exists():
            commit(done, 2, generation=1, change=lambda table: table)
            done.supersede()
        return real(path)

    monkeypatch.setattr(export_module, "_open_whole", replaced_first)
    before = read(done.completion(2, 0))
    export(done, tmp_path / "dest", PARQUET)
    assert not done.completion(2, 0).exists()
    assert read(tmp_path / "dest" / "b.parquet").slice(3, len(before)).equals(before)


def test_a_full_disk_is_named_and_leaves_nothing(done: RunDir, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", disk]).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            export(done, disk / "dest", PARQUET)
        assert Path(caught.value.filename).suffix == ".parquet" and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_leftovers_of_dead_exports_are_cleared_and_of_live_ones_not(done: RunDir, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    live = temporary(dest)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    dead = live.with_name(live.name.replace(f"-{os.getpid()}-", f"-{gone.stdout.strip()}-"))
    other = live.with_name(live.name.replace(".dest.", ".dest.elsewhere-", 1))
    for folder in (live, dead, other):
        folder.mkdir()
        (folder / "a.parquet").touch()
    export(done, dest, PARQUET)
    assert [folder.exists() for folder in (live, dead, other)] == [True, False, True]
