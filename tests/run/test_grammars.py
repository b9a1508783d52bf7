"""Structured output through the real command line: every row within its grammar, or an error that says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from tests.run.jobs import batchinfer, completions

QUICK = ["hw=cpu", "hw.cpus_per_gpu=1", "launcher=inline", "input=parquet", "input.prompt_column=p", "sampling.max_tokens=48"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
NEVER = {"$ref": "#/$defs/never"}  # nothing satisfies what says of itself only that it satisfies itself
DEAD_END = {"type": "object", "properties": {"a": NEVER}, "required": ["a"], "$defs": {"never": NEVER}}
OVERRIDES: list[dict[str, Any] | None] = [
    None,
    {"json_schema": SCHEMA},
    {"json_schema": json.dumps(SCHEMA), "temperature": 0},
    {"regex": r"[A-Z][a-z]{0,8}\."},
    {"regex": "(a"},
    {"json_schema": {"type": "string", "minLength": 2, "maxLength": 1}},
    {"regex": r"[^\s\S]"},
    {"choice": []},
    {"json_schema": DEAD_END},
    {"regex": "[ab]{100}", "max_tokens": 3},
    {"choice": ["</s>", " x"], "ignore_eos": True, "min_tokens": 40},
]


def write(folder: Path, rows: int = 33) -> Path:
    overrides = [OVERRIDES[i % len(OVERRIDES)] for i in range(rows)]
    table = pa.table({"p": [f"def f{i}(" for i in range(rows)], "s": [None if o is None else json.dumps(o) for o in overrides]})
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "in.parquet")
    return folder


def test_rows_with_good_bad_and_impossible_grammars(tmp_path: Path) -> None:
    folder, run_dir = write(tmp_path / "in"), tmp_path / "run"
    request = ["sampling.temperature=1", "sampling.choice=[yes,no]", "input.sampling_column=s"]
    done = batchinfer(*QUICK, f"input.paths=['{folder}']", f"output.dir={run_dir}", *request)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(RunDir(run_dir)) == []
    rows = completions(run_dir).to_pylist()
    assert len(rows) == 33
    for start in range(0, 33, 11):
        default, mapping, text, name, *bad, dead, cut, last = rows[start : start + 11]
        assert default["completion"] in ("yes", "no") and default["finish_reason"] == "stop"
        for row in (mapping, text):
            if row["finish_reason"] == "stop":
                value = json.loads(row["completion"])
                assert list(value) == ["name", "ok"] and len(value["name"]) <= 5 and type(value["ok"]) is bool
        assert re.fullmatch(r"[A-Z][a-z]{0,8}\.", name["completion"]) and name["finish_reason"] == "stop"
        assert [row["error"] for row in bad] == ["bad_grammar"] * 3 + ["bad_sampling"]
        for row, words in zip(
            bad, ("unclosed group", "minLength (2) is greater", "no text can satisfy it", "at least one"), strict=True
        ):
            assert words in row["error_message"] and row["completion"] is None and row["num_completion_tokens"] == 0
        assert dead["error"] == "bad_grammar" and dead["finish_reason"] == "error" and dead["completion"] is None
        assert dead["error_message"] == "the grammar cannot be followed: no text can satisfy it"
        assert dead["num_completion_tokens"] > 3  # drawn before that was seen
        assert re.fullmatch("[ab]{3,99}", cut["completion"]) and cut["finish_reason"] == "length"
        assert last["completion"] in ("</s>", " x") and last["finish_reason"] == "stop"


def test_a_bad_grammar_for_all_rows_starts_nothing(tmp_path: Path) -> None:
    folder, run_dir = write(tmp_path / "in", 1), tmp_path / "run"
    for bad, words in (
        ('sampling.regex="(a"', "sampling.regex=(a: unclosed group"),
        ("sampling.json_schema={type:objct}", "Invalid type: objct"),
        ("sampling.choice=[]", "sampling.choice=[]: must name at least one string"),
    ):
        done = batchinfer(*QUICK, f"input.paths=['{folder}']", f"output.dir={run_dir}", bad)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not run_dir.exists()
