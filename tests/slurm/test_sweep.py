"""The sweep: points that run, that are kept, that fail; and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchinfer.bench import points
from batchinfer.bench.points import measure
from batchinfer.config import ConfigError
from slurm import sweep

CPU = ["hw=cpu", "hw.cpus_per_gpu=1"]
QUICK = ["--models", "tiny", "--output-len", "3", "--warmup", "1", "--steps", "2", "--batches", "1", "2"]


def test_two_points_from_the_command_to_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICK, "--lengths", "16", "--out", str(tmp_path), *CPU]
    assert sweep.main(words) == 0
    files = [f"tiny_gpus1_batch{batch}_in16.json" for batch in (1, 2)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.md", "tiny.png", *files]
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "tiny.png").stat().st_size > 10_000
    found = [json.loads((tmp_path / file).read_text())["workloads"]["custom"] for file in files]
    assert [one["tokens_out"] for one in found] == [3, 6] and [len(one["batchinfer"]["all_seconds"]) for one in found] == [3, 3]
    head, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert head.startswith("| model | GPUs | batch | prompt |")
    assert [row.split(" | ")[:4] for row in rows] == [["| tiny", "1", "1", "16"], ["| tiny", "1", "2", "16"]]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    capsys.readouterr()
    assert sweep.main(words) == 0 and {file: file.stat().st_mtime_ns for file in before} == before  # nothing is run again
    assert "running" not in capsys.readouterr().err
    assert sweep.main([*words, "seed=1"]) == 2
    assert "tiny_gpus1_batch1_in16.json: was made by" in capsys.readouterr().err


def test_a_point_that_fails_is_a_line_and_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICK, "--lengths", "16", "5000", "--batches", "1", "--out", str(tmp_path), *CPU]
    assert sweep.main(words) == 1
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert rows[0].startswith("| tiny | 1 | 1 | 16 | ") and "failed" not in rows[0]
    assert rows[1].startswith("| tiny | 1 | 1 | 5,000 | failed: bench.workload=custom: request 0 has 5,000 tokens")
    assert (tmp_path / "tiny_gpus1_batch1_in5000.failed").exists() and (tmp_path / "tiny.png").exists()
    capsys.readouterr()
    assert sweep.main(words) == 1
    assert capsys.readouterr().err.splitlines() == ["tiny_gpus1_batch1_in5000: running"]


def found_of(all_seconds: list[float], first_s: float = 0.5, batch: int = 2, out: int = 11) -> dict[str, Any]:
    ours = {"all_seconds": all_seconds, "first_token_s": first_s, "ran_seconds": 1.5}
    workload = {"batchinfer": ours, "requests": batch, "tokens_out": batch * out, "floor": {"sequential_s": 0.5}}
    return {"workloads": {"custom": workload}}


def test_repetitions_of_the_warm_up_do_not_count() -> None:
    figures = sweep.Figures.of(found_of([9.0, 9.0, 1.0, 2.0, 3.0]), warmup=2)
    assert (figures.seconds, figures.shortest_s, figures.longest_s) == (2.0, 1.0, 3.0)
    assert (figures.out_tok_s, figures.token_ms, figures.first_token_ms, figures.times_floor) == (11.0, 100.0, 500.0, 4.0)
    assert sweep.Figures.of(found_of([1.0], out=1), warmup=0).token_ms is None


def test_the_words_of_a_point() -> None:
    asked = sweep.parse(["--models", "llama7b:/data/7b", "--gpus", "2", "--out", "x", "hw=h200x2"])
    assert (asked.batches, asked.lengths) == ([1, 4, 8, 16], [128, 256, 512, 1024, 2048])
    words = sweep.Place("llama7b:/data/7b", 2, 4, 256).words(asked)
    assert words[:3] == ["model=llama7b", "model.path=/data/7b", "hw.tensor_parallel=2"] and words[-1] == "hw=h200x2"
    assert {"bench.num_requests=4", "bench.input_len=256", "bench.output_len=128", "bench.repeat=25"} < set(words)


def test_an_engine_that_dies_gives_its_reason(tmp_path: Path) -> None:
    point = measure(tmp_path, "p", [*CPU, "bench.input_len=8", "bench.output_len=2", "bench.peers=[]", "hw.env.WORLD_SIZE=x"])
    assert point.found is None and point.why is not None and "'x'" in point.why
    assert (tmp_path / "p.failed").read_text().startswith(point.why)


def test_an_interrupt_ends_the_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points.sys, "executable", "/bin/sh")
    monkeypatch.setattr(points, "_arguments", lambda words: ["-c", "exit 130"])
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, "p", [])
    assert list(tmp_path.iterdir()) == []


def test_another_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"conditions": {"command": "python -m batchinfer bench seed=1"}}))
    assert measure(tmp_path, "p", ["seed=1"]).found is not None
    with pytest.raises(ConfigError, match=r"p.json: was made by `python -m batchinfer bench seed=1`, and this would be"):
        measure(tmp_path, "p", ["seed=2"])
