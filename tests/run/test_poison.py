"""A row that ends every worker which has it: all others get their true text, it becomes an error row, and that ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.job.replica import read_death
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from tests.run.jobs import batchinfer, completions, processes_of, texts

ROWS, DEADLY = 12, 5
PROMPTS = [[3 + k, 40, 41 + k % 3] for k in range(ROWS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poison")
    pq.write_table(pa.table({"ids": PROMPTS}), folder / "in.parquet")
    done = batchinfer(*request(folder), "launcher=inline", f"output.dir={folder / 'whole'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def request(folder: Path) -> list[str]:
    source = ["input=parquet", f"input.paths=['{folder / 'in.parquet'}']", "input.token_ids_column=ids"]
    rows = ["input.rows_per_unit=1", "sampling.max_tokens=12", "engine.max_num_seqs=4", "output.token_ids=true"]
    return ["hw=cpu", "model.dtype=float64", *source, *rows]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, run_dir: Path, how: str, *overrides: str) -> str:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "poison"), prepend=os.pathsep)
    monkeypatch.setenv("BATCHINFER_POISON", json.dumps({"prompt": PROMPTS[DEADLY], "how": how}))
    done = batchinfer(*request(folder), *overrides, f"output.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.delenv("BATCHINFER_POISON")
    return done.stdout + done.stderr


def assert_one_error(run_dir: Path, folder: Path, reason: str) -> None:
    assert verify(RunDir(run_dir)) == []
    key = ("in.parquet", DEADLY, 0)
    found, expected = texts(run_dir), texts(folder / "whole")
    assert found.keys() == expected.keys()
    assert {name: row for name, row in found.items() if name != key} == {k: row for k, row in expected.items() if k != key}
    (row,) = [row for row in completions(run_dir).to_pylist() if row["error"] is not None]
    assert (row["row"], row["error"], row["completion"]) == (DEADLY, "killed_replica", None)
    assert (
        row["error_message"].startswith("alone in the engine it ended its replica 2 times; the last one ")
        and reason in (row["error_message"])
    )
    assert not processes_of(run_dir)


def deaths(run_dir: Path) -> list[bool]:
    """Of each replica that died, in order: whether it was restarted."""
    names = sorted((path.name for path in (run_dir / "replicas").iterdir()), key=lambda name: int((name + ".0").split(".")[1]))
    found = (read_death(RunDir(run_dir), name) for name in names)
    return [death.restarted_as is not None for death in found if death is not None]


def test_a_row_that_kills_becomes_an_error_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    said = run(monkeypatch, folder, run_dir, "kill", "launcher=local")
    assert_one_error(run_dir, folder, "killed by SIGKILL")
    assert deaths(run_dir) == [True] * 4, "two in company, two by itself"
    assert "error killed_replica:" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason", "overrides"),
    [
        ("exit", "SystemExit: 7", ["hw.gpus_per_node=2", "hw.tensor_parallel=1"]),
        ("hang", " s: rank 0 in step ", ["engine.stall_timeout_s=4"]),
        ("kill", "rank 0 was killed by SIGKILL", ["hw.gpus_per_node=2", "hw.tensor_parallel=2"]),
    ],
)
def test_however_it_ends_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, reason: str, overrides: list[str]
) -> None:
    run_dir = tmp_path / "run"
    run(monkeypatch, folder, run_dir, how, "input.rows_per_unit=3", "launcher=local", *overrides)
    assert_one_error(run_dir, folder, reason)
    again = batchinfer("retry", run_dir)
    assert again.returncode == 0 and "retry: 1 of 1 error rows have a completion now" in again.stdout, again.stderr
    assert verify(RunDir(run_dir)) == []
    assert texts(run_dir) == texts(folder / "whole")
