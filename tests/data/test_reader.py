"""Finding shards and reading units: odd names, damaged files, row groups of any size, memory that does not grow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.config import ConfigError
from batchinfer.data import reader as reader_module
from batchinfer.data.reader import InputChanged, UnitReader, scan_shards
from batchinfer.data.schema import RowRange

HYPOTHESIS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, rows: int = 3, first: int = 0, row_group_size: int | None = None, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "p": pa.array([f"{path.name} {first + i}" for i in range(rows)], pa.string()),
            "n": pa.array(range(first, first + rows), pa.int64()),
            **columns,
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def names(*paths: Path | str) -> list[str]:
    return [shard.path for shard in scan_shards([str(path) for path in paths]).shards]


class TestScan:
    def test_files_folders_and_globs_in_order_without_duplicates(self, tmp_path: Path) -> None:
        for name in ("b.parquet", "a.parquet", "deep/c.parquet", "deep/er/d.parquet"):
            write(tmp_path / name)
        everything = ["a.parquet", "b.parquet", "deep/c.parquet", "deep/er/d.parquet"]
        assert names(tmp_path) == everything
        assert names(tmp_path / "**/*.parquet", tmp_path / "a.parquet", tmp_path) == everything
        assert names(tmp_path / "*.parquet") == ["a.parquet", "b.parquet"]
        assert names(tmp_path / "deep") == ["c.parquet", "er/d.parquet"]
        assert scan_shards([str(tmp_path / "deep")]).root == tmp_path / "deep"
        assert scan_shards([str(tmp_path / "a.parquet")]).root == tmp_path

    def test_relative_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.parquet")
        monkeypatch.chdir(tmp_path)
        found = scan_shards(["a.parquet"])
        assert found.root == tmp_path and found.shards[0].path == "a.parquet" and found.shards[0].num_rows == 3

    def test_hidden_private_and_other_files_in_folders_are_skipped(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet")
        for name in (".b.parquet", "_c.parquet", ".cache/d.parquet", "_temporary/e.parquet", "f.parquet.tmp"):
            write(tmp_path / name)
        (tmp_path / "_SUCCESS").touch()
        assert names(tmp_path) == ["a.parquet"]
        assert names(tmp_path / "[_a]*") == ["a.parquet"]

    @pytest.mark.parametrize(
        "name", ["with space.parquet", 'it\'s "quoted".parquet', "émoji 🎉 你.parquet", "[01] * ?.parquet", "a,b=c.parquet"]
    )
    def test_odd_names(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / "[x]" / name)
        write(tmp_path / "[x]" / "0.parquet")
        found = scan_shards([str(tmp_path / "[x]" / name)])
        assert [shard.path for shard in found.shards] == [name]
        assert UnitReader(found.root, found.shards, ["n"]).read((RowRange(0, 1, 3),))["n"].to_pylist() == [1, 2]
        assert len(names(tmp_path / "[x]")) == 2

    def test_linked_folders_are_followed_but_not_in_circles(self, tmp_path: Path) -> None:
        write(tmp_path / "real/a.parquet")
        (tmp_path / "tree").mkdir()
        for name, target in (("link", "real"), ("other", "real"), ("loop", "tree")):
            (tmp_path / "tree" / name).symlink_to(tmp_path / target)
        assert names(tmp_path / "tree") == ["link/a.parquet", "other/a.parquet"]

    def test_a_folder_that_cannot_be_listed_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "deep/a.parquet")
        listing = os.scandir

        def scandir(path: str) -> object:
            if path.endswith("deep"):
                raise PermissionError(13, "Permission denied", path)
            return listing(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(ConfigError, match=r"folder '.*deep' cannot be listed: Permission denied"):
            names(tmp_path)

    def test_datasets_in_folders_that_are_named_like_files(self, tmp_path: Path) -> None:
        write(tmp_path / "set.parquet/part-0.parquet")
        assert names(tmp_path) == ["part-0.parquet"]

    def test_two_links_to_one_content_are_two_shards(self, tmp_path: Path) -> None:
        blob = write(tmp_path / "blobs/x")
        for name in ("a.parquet", "b.parquet"):
            (tmp_path / name).symlink_to(blob)
        assert names(tmp_path) == ["a.parquet", "b.parquet"]

    def test_files_without_rows_are_fine(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", rows=0)
        write(tmp_path / "b.parquet")
        assert [shard.num_rows for shard in scan_shards([str(tmp_path)]).shards] == [0, 3]

    def test_a_footer_longer_than_one_read(self, tmp_path: Path) -> None:
        wide = pa.table({f"a rather long column name {i}": [i] for i in range(1500)})
        pq.write_table(wide, tmp_path / "a.parquet")
        assert os.path.getsize(tmp_path / "a.parquet") > 2 * reader_module._TAIL
        assert scan_shards([str(tmp_path)]).schema.names == wide.column_names

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for path in ("nowhere.parquet", "*.parquet"):
            with pytest.raises(ConfigError, match="no file, folder or glob that matches"):
                names(tmp_path / path)
        with pytest.raises(ConfigError, match=r"empty' is a folder without \*\.parquet files"):
            names(tmp_path / "empty")
        with pytest.raises(ConfigError, match=r"input\.paths is empty"):
            scan_shards([])

    @pytest.mark.parametrize("damage", ["empty", "short", "text", "end", "middle", "beginning", "footer", "length"])
    def test_damaged_files_are_named(self, tmp_path: Path, damage: str) -> None:
        write(tmp_path / "good.parquet", rows=500)
        path = write(tmp_path / "bad one.parquet", rows=500)
        data = path.read_bytes()
        path.write_bytes(
            {
                "empty": b"",
                "short": b"PAR1PAR1",
                "text": b"a,b\n1,2\n" * 99,
                "end": data[:-100],
                "middle": data[:200] + data[900:],
                "beginning": data[300:],
                "footer": data[:-200] + b"\xff" * 150 + data[-50:],
                "length": data[:-8] + b"\xff\xff\xff\x7fPAR1",
            }[damage]
        )
        with pytest.raises(ConfigError, match=r"bad one\.parquet' cannot be read as Parquet"):
            scan_shards([str(tmp_path)])

    def test_an_unreadable_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "dangling.parquet").symlink_to(tmp_path / "gone")
        with pytest.raises(ConfigError, match=r"dangling\.parquet.*No such file"):
            scan_shards([str(tmp_path)])

    def test_duplicate_columns_are_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=r"a\.parquet' has more than one column named 'x'"):
            scan_shards([str(tmp_path)])

    def test_different_columns_name_both_files(self, tmp_path: Path) -> None:
        first = write(tmp_path / "a.parquet")
        for name, extra, words in (
            ("other type", {"n": pa.array([1.0] * 3)}, "'n' is int64 in .*a.parquet', but is double in"),
            ("one more", {"x": pa.array([1] * 3)}, "'x' does not exist in .*a.parquet', but is int64 in"),
        ):
            second = write(tmp_path / f"{name}.parquet", **extra)
            with pytest.raises(ConfigError, match=words + f".*{name}"):
                names(first, second)
            with pytest.raises(ConfigError, match="all files of a run must have the same columns"):
                names(first, second)

    def test_order_nullability_and_metadata_may_differ(self, tmp_path: Path) -> None:
        p, n = pa.field("p", pa.string()), pa.field("n", pa.int64(), nullable=False, metadata={"a": "b"})
        pq.write_table(pa.table({"p": ["x"], "n": [1]}, schema=pa.schema([p, n], {"one": "1"})), tmp_path / "a.parquet")
        nullable = pa.schema([n.with_nullable(True).remove_metadata(), p], {"two": "2"})
        pq.write_table(pa.table({"n": [None], "p": ["y"]}, schema=nullable), tmp_path / "b.parquet")
        found = scan_shards([str(tmp_path)])
        assert found.schema.names == ["p", "n"] and found.schema.field("n").nullable
        table = UnitReader(found.root, found.shards, ["n", "p"]).read((RowRange(0, 0, 1), RowRange(1, 0, 1)))
        assert table.to_pydict() == {"n": [1, None], "p": ["x", "y"]}

    def test_a_thousand_shards_take_a_moment(self, tmp_path: Path) -> None:
        data = write(tmp_path / "0.parquet").read_bytes()
        for i in range(1, 1000):
            (tmp_path / f"{i}.parquet").write_bytes(data)
        started = time.perf_counter()
        assert len(scan_shards([str(tmp_path)]).shards) == 1000
        assert time.perf_counter() - started < 3


@pytest.fixture(scope="module")
def odd_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    write(folder / "a.parquet", rows=1000, row_group_size=7)
    write(folder / "b.parquet", rows=700, first=1000, row_group_size=300)
    write(folder / "c.parquet", rows=0)
    write(folder / "d.parquet", rows=900, first=1700)
    return folder


RANGES = st.lists(
    st.sampled_from([(0, 1000), (1, 700), (3, 900)]).flatmap(
        lambda s: st.tuples(st.integers(0, s[1] - 1), st.integers(1, 400)).map(
            lambda r: RowRange(s[0], r[0], min(s[1], r[0] + r[1]))
        )
    ),
    min_size=1,
    max_size=5,
)


class TestUnitReader:
    @HYPOTHESIS
    @given(units=st.lists(RANGES, min_size=1, max_size=4))
    def test_any_units_in_any_order(self, odd_groups: Path, units: list[list[RowRange]]) -> None:
        found = scan_shards([str(odd_groups)])
        reader = UnitReader(found.root, found.shards, ["n", "p"])
        offsets = {0: 0, 1: 1000, 3: 1700}
        for unit in units:
            expected = [offsets[r.shard] + i for r in unit for i in range(r.start, r.stop)]
            table = reader.read(tuple(unit))
            assert table.column_names == ["n", "p"]
            assert table["n"].to_pylist() == expected
            assert [int(text.split()[1]) for text in table["p"].to_pylist()] == expected

    def test_consecutive_units_decode_every_row_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.parquet", rows=20_000)
        decoded = 0

        class Counting(pq.ParquetFile):  # type: ignore[misc]
            def iter_batches(self, *args: object, **kwargs: object) -> object:
                nonlocal decoded
                for batch in super().iter_batches(*args, **kwargs):
                    decoded += batch.num_rows
                    yield batch

        found = scan_shards([str(tmp_path)])
        monkeypatch.setattr(pq, "ParquetFile", Counting)
        reader = UnitReader(found.root, found.shards, ["n"])
        for start in range(0, 20_000, 100):
            assert reader.read((RowRange(0, start, start + 100),))["n"][0].as_py() == start
            assert decoded <= start + 100 + reader_module._BATCH_ROWS
        assert decoded == 20_000

    def test_a_row_group_far_ahead_is_reached_without_decoding_what_lies_before(
        self, odd_groups: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = scan_shards([str(odd_groups)])
        reader = UnitReader(found.root, found.shards, ["n"])
        groups: list[int] = []
        original = pq.ParquetFile.iter_batches

        def spy(self: pq.ParquetFile, *args: object, **kwargs: list[int]) -> object:
            groups.extend(kwargs["row_groups"])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
        reader.read((RowRange(0, 0, 3),))
        reader.read((RowRange(0, 700, 710),))
        reader.read((RowRange(0, 20, 22),))
        assert groups == [0, 100, 101, 2, 3]

    def test_a_million_rows_in_one_group_stay_out_of_memory(self, tmp_path: Path) -> None:
        rows = 1_000_000
        table = pa.table({"n": pa.array(range(rows)), "p": pa.array([f"a prompt with the number {i}" for i in range(rows)])})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows, compression="snappy", use_dictionary=False)
        del table
        found = scan_shards([str(tmp_path)])
        reader = UnitReader(found.root, found.shards, ["n", "p"])
        before = pa.total_allocated_bytes()
        peak, started = 0, time.perf_counter()
        for start in range(0, rows, 4000):
            unit = reader.read((RowRange(0, start, start + 4000),))
            assert unit["n"][0].as_py() == start and unit.num_rows == 4000
            peak = max(peak, pa.total_allocated_bytes() - before)
        assert peak < 20e6
        assert time.perf_counter() - started < 10

    def test_few_files_stay_open(self, tmp_path: Path) -> None:
        for i in range(20):
            write(tmp_path / f"{i:02d}.parquet")
        found = scan_shards([str(tmp_path)])
        reader = UnitReader(found.root, found.shards, ["p"])
        before = len(os.listdir("/proc/self/fd"))
        table = reader.read(tuple(RowRange(i, 0, 3) for i in range(20)))
        assert table["p"].to_pylist() == [f"{i:02d}.parquet {j}" for i in range(20) for j in range(3)]
        assert len(os.listdir("/proc/self/fd")) - before <= reader_module._OPEN_FILES

    def test_dictionaries_differ_between_row_groups(self, tmp_path: Path) -> None:
        texts = [f"{i // 50}" for i in range(500)]
        dictionary = pa.array(texts).dictionary_encode()
        pq.write_table(pa.table({"d": dictionary}), tmp_path / "a.parquet", row_group_size=60)
        found = scan_shards([str(tmp_path)])
        table = UnitReader(found.root, found.shards, ["d"]).read((RowRange(0, 10, 490),))
        assert table["d"].type == dictionary.type and table["d"].to_pylist() == texts[10:490]

    def test_columns_with_dots(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"a.b": [1, 2], "a": [{"b": 3, "c": 4}] * 2, "c": [5, 6]}), tmp_path / "x.parquet")
        found = scan_shards([str(tmp_path)])
        table = UnitReader(found.root, found.shards, ["a.b", "a"]).read((RowRange(0, 1, 2),))
        assert table.to_pylist() == [{"a.b": 2, "a": {"b": 3, "c": 4}}]
        only = UnitReader(found.root, found.shards, ["a.b"]).read((RowRange(0, 1, 2),))
        assert only.to_pylist() == [{"a.b": 2}]

    @pytest.mark.parametrize("opened", [False, True])
    @pytest.mark.parametrize("change", ["longer", "same size", "gone", "truncated"])
    def test_changed_files_are_refused(self, tmp_path: Path, change: str, opened: bool) -> None:
        path = write(tmp_path / "a.parquet", rows=5, first=10)
        found = scan_shards([str(path)])
        reader = UnitReader(found.root, found.shards, ["n"])
        if opened:
            reader.read((RowRange(0, 0, 1),))
        if change == "longer":
            write(path, rows=9)
        elif change == "same size":
            write(path, rows=5, first=20)
            assert path.stat().st_size == found.shards[0].size
        elif change == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputChanged, match=r"a\.parquet"):
            reader.read((RowRange(0, 1, 2),))

    def test_damaged_pages_name_file_and_rows(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", rows=3000)
        found = scan_shards([str(path)])
        data = bytearray(path.read_bytes())
        data[4:4000] = b"\xff" * 3996
        path.write_bytes(data)
        with pytest.raises(RuntimeError, match=r"a\.parquet': rows 1,000 to 1,009 cannot be read"):
            UnitReader(found.root, found.shards, ["p", "n"]).read((RowRange(0, 1000, 1010),))

    def test_a_flipped_bit_is_found_where_pages_have_checksums(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"prompt": ["dear reader"]}), path, compression="none", write_page_checksum=True)
        inputs = scan_shards([str(path)])
        data = path.read_bytes()
        path.write_bytes(data.replace(b"dear", b"deaf", 1))
        with pytest.raises(RuntimeError, match=r"a\.parquet.*CRC"):
            UnitReader(inputs.root, inputs.shards, ["prompt"]).read((RowRange(0, 0, 1),))
