"""The layouts of a node beside each other: a run that is whole, a layout that cannot be, and what is made of summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchinfer.bench.workloads import BenchRequest, Workload
from slurm import scaling
from slurm.scaling import Layout

CPU = ["hw=cpu", "hw.cpus_per_gpu=1", "model=tiny", "bench.num_requests=6", "bench.output_len=4"]


def test_layouts_from_the_command_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--layouts", "1x1", "1x3", "--out", str(tmp_path), *CPU]
    assert scaling.main(words) == 1
    one, three = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert one.startswith("| 1x1 | 6 | ") and "| 1.000 | 100.0% | - | - | " in one
    assert three.startswith("| 1x3 | failed: ") and "hw.tensor_parallel=3" in three
    committed = {file: file.stat().st_mtime_ns for file in (tmp_path / "1x1" / "completions").iterdir()}
    assert scaling.main(words[:2] + words[3:]) == 0  # 1x1 alone: nothing is computed again
    assert {file: file.stat().st_mtime_ns for file in committed} == committed
    assert scaling.main([*words, "bench.workload=[single,mixed]"]) == 2
    assert "bench.workload=['single', 'mixed']: must be one workload here" in capsys.readouterr().err


def test_replicas_share_no_prompts(tmp_path: Path) -> None:
    workload = Workload("own", [BenchRequest([1, 2, 99], 5), BenchRequest([7], 3)])
    first, second = (pq.read_table(file).to_pylist() for file in scaling.write_inputs(tmp_path, workload, 100, 2))
    assert [row["token_ids"] for row in first] == [[1, 2, 99], [7]] and [row["token_ids"] for row in second] == [[2, 3, 0], [8]]
    assert [row["sampling"] for row in first] == [{"max_tokens": 5}, {"max_tokens": 3}] == [row["sampling"] for row in second]


def summary(tokens_out_s: float, predicted: float | None = None) -> dict[str, Any]:
    beside = predicted and {"tokens_out_s": {"predicted": predicted, "actual": tokens_out_s}}
    return {"rows": 1024, "wall_s": 48.4, "tokens_out_s": tokens_out_s, "predicted": beside, "tail_s": 0.25}


def test_rates_are_held_against_the_first_layout_that_ran() -> None:
    found = {Layout(1, 4): "died", Layout(1, 2): summary(6000.0, 5000.0), Layout(4, 2): summary(21600.0)}
    failed, first, more = list(scaling.table(found))[2:]
    assert failed == "| 1x4 | failed: died | | | | | | | |"
    assert first == "| 1x2 | 1,024 | 48.40 | 6,000 | 1.000 | 100.0% | 5,000 | +20.0% | 0.25 s |"
    assert more == "| 4x2 | 1,024 | 48.40 | 21,600 | 3.600 | 90.0% | - | - | 0.25 s |"


def test_a_layout_is_two_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--layouts", "2", "--out", "unused"])
    assert "'2': must be replicas x ranks, as 2x1" in capsys.readouterr().err
