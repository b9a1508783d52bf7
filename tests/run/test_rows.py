"""Rows of every kind through the whole job: what goes in comes out, once, unchanged, with its completion or its error."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.run.jobs import batchinfer, completions

QUICK = ["hw=cpu", "launcher=inline", "sampling.max_tokens=6", "input=parquet"]
UTC = datetime.UTC


def awkward_table() -> pa.Table:
    """Nine rows with a column of most types that Parquet can hold, a null prompt, an empty one and one far too long."""
    prompts = ["Return the ", None, "", "word " * 5000, "def f(x):\n", "naïve 雪 ", "The ", "x", "Read a file"]
    number = range(len(prompts))
    return pa.table(
        {
            "prompt": pa.array(prompts, pa.large_string()),
            "id": pa.array([f"row {k}" for k in number], pa.string()),
            "nested": pa.array([{"a": [k, None], "b": {"c": str(k)}} if k % 2 else None for k in number]),
            "kind": pa.array(["x", "y", "x"] * 3).dictionary_encode(),
            "when": pa.array(
                [datetime.datetime(2026, 1, 1 + k, tzinfo=UTC) for k in number], pa.timestamp("us", "Europe/Berlin")
            ),
            "nanos": pa.array([10**18 + k for k in number], pa.timestamp("ns")),
            "blob": pa.array([bytes([k, 0, 255]) for k in number], pa.binary()),
            "price": pa.array([decimal.Decimal(k) / 4 for k in number], pa.decimal128(10, 2)),
            "flags": pa.array([[True, None]] * len(prompts), pa.list_(pa.bool_())),
        }
    )


@pytest.fixture(scope="module")
def awkward_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    folder = tmp_path_factory.mktemp("awkward")
    inputs = folder / 'in put\'s "dir"'
    inputs.mkdir()
    table = awkward_table()
    pq.write_table(table.slice(0, 5), inputs / "a b'c.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 0), inputs / "empty.parquet")
    pq.write_table(table.slice(5), inputs / "z[1].parquet", row_group_size=3)
    run_dir = folder / "run"
    paths = json.dumps([str(inputs)])
    result = batchinfer(
        *QUICK,
        f"input.paths={paths}",
        "input.prompt_column=prompt",
        "input.rows_per_unit=4",
        "output.token_ids=true",
        f"output.dir={run_dir}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    verified = batchinfer("verify", run_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    return run_dir, table


def test_input_columns_come_out_unchanged_in_value_and_type(awkward_run: tuple[Path, pa.Table]) -> None:
    run_dir, table = awkward_run
    got = completions(run_dir).sort_by([("shard", "ascending"), ("row", "ascending")])
    for name in table.column_names:
        assert got.schema.field(name).type == table.schema.field(name).type, name
        assert got.column(name).combine_chunks().equals(table.column(name).combine_chunks()), name


def test_bad_rows_are_rows(awkward_run: tuple[Path, pa.Table]) -> None:
    run_dir, _ = awkward_run
    rows = {row["id"]: row for row in completions(run_dir).drop(["nanos"]).to_pylist()}
    assert {name: row["error"] for name, row in rows.items() if row["error"]} == {
        "row 1": "null_prompt",
        "row 3": "prompt_too_long",
    }
    assert "5" in rows["row 3"]["error_message"] and rows["row 3"]["completion"] is None
    for name in ("row 0", "row 2", "row 5"):
        assert rows[name]["num_completion_tokens"] > 0 and isinstance(rows[name]["completion"], str)
        assert rows[name]["finish_reason"] in ("stop", "length")
        assert 0 <= rows[name]["ttft_s"] <= rows[name]["latency_s"]


def test_statistics_add_up_to_the_rows(awkward_run: tuple[Path, pa.Table]) -> None:
    run_dir, _ = awkward_run
    stats = pa.concat_tables([pq.read_table(path) for path in sorted((run_dir / "stats").glob("*.parquet"))])
    rows = completions(run_dir).drop(["nanos"]).to_pylist()
    good = [row for row in rows if row["error"] is None]
    assert sum(stats.column("prefill_tokens").to_pylist()) == sum(row["num_prompt_tokens"] for row in good)
    assert sum(stats.column("decode_tokens").to_pylist()) == sum(row["num_completion_tokens"] for row in rows)
    steps = set(stats.column("step").to_pylist())
    assert all(row["step_first"] in steps and row["step_last"] in steps for row in good)


def test_a_second_run_of_the_same_request_does_nothing_and_another_request_is_refused(awkward_run: tuple[Path, pa.Table]) -> None:
    run_dir, _ = awkward_run
    before = sorted(path.name for path in (run_dir / "completions").iterdir())
    inputs = json.dumps([str(run_dir.parent / 'in put\'s "dir"')])
    request = [
        *QUICK,
        f"input.paths={inputs}",
        "input.prompt_column=prompt",
        "input.rows_per_unit=4",
        "output.token_ids=true",
        f"output.dir={run_dir}",
    ]
    assert batchinfer(*request).returncode == 0
    assert sorted(path.name for path in (run_dir / "completions").iterdir()) == before
    refused = batchinfer(*request, "sampling.temperature=0.5")
    assert refused.returncode == 2
    assert "sampling.temperature" in refused.stderr and "0.5" in refused.stderr and "Traceback" not in refused.stderr


def test_chats_templates_and_sampling_of_the_row(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "Sort a list"}]
    table = pa.table(
        {
            "chat": pa.array(
                [message, None, [{"role": "user"}]], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
            ),
            "sampling": ['{"max_tokens": 3, "ignore_eos": true}', None, '{"max_token": 3}'],
        }
    )
    pq.write_table(table, tmp_path / "chats.parquet")
    run_dir = tmp_path / "run"
    result = batchinfer(
        *QUICK,
        f"input.paths=[{tmp_path}/chats.parquet]",
        "input.messages_column=chat",
        "input.system_prompt=Be brief.",
        "input.sampling_column=sampling",
        f"output.dir={run_dir}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    first, second, third = completions(run_dir).to_pylist()
    assert first["num_completion_tokens"] == 3 and first["error"] is None
    assert second["error"] == "null_prompt"
    assert third["error"] in ("bad_messages", "bad_sampling")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("input.prompt_column=promt", "prompt"),
        ("input.paths=[/nowhere/*.parquet]", "/nowhere"),
        ("sampling.temperature=-1", "sampling.temperature=-1"),
        ("sampling.tempature=1", "temperature"),
        ("model=llama8b", "llama7b"),
        ("sampling.n=0", "sampling.n=0"),
        ("engine.prefix_caching=1", "prefix_caching"),
        ("model.path=/nowhere", "model.path"),
    ],
)
def test_a_wrong_request_gets_one_sentence(tmp_path: Path, override: str, says: str) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "in.parquet")
    request = [
        *QUICK,
        f"input.paths=[{tmp_path}/in.parquet]",
        "input.prompt_column=prompt",
        f"output.dir={tmp_path}/run",
        override,
    ]
    result = batchinfer(*request)
    assert result.returncode == 2, result.stdout + result.stderr
    assert says in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "manifest.json").exists()
