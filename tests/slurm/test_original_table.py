"""The original design's table, from its three benches to its ratios, and the prediction for four GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.bench.points import Point
from batchinfer.compose import compose
from slurm.bench import original_table

CPU = ["hw=cpu", "hw.cpus_per_gpu=1"]


@pytest.mark.slow
def test_the_original_table_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lengths", "16", "4", "--steps", "1", "--out", str(tmp_path), *CPU, "hw.gpus_per_node=2", "model=tiny"]
    assert original_table.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:-2]] == [
        ["| Hugging Face, one GPU", "35", "120 ms", "1.00"],
        ["| tensor parallel 2, plain PyTorch", "55", "85 ms", "1.57"],
        ["| tensor parallel 2, our kernels", "65", "70 ms", "1.86"],
    ]  # and no prediction, as there is none for a CPU
    assert lines[-1].startswith("first token of ours after at most ")
    plain = json.loads((tmp_path / "plain.json").read_text())["conditions"]["engine"]
    assert (plain["attention_backend"], plain["cuda_graphs"], plain["overlap"]) == ("reference", False, False)
    assert json.loads((tmp_path / "kernels.json").read_text())["conditions"]["engine"]["attention_backend"] == "auto"


def test_one_gpu_is_too_few_for_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert original_table.main(["--out", str(tmp_path), *CPU]) == 2
    assert "hw.gpus_per_node=1: must be at least 2" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_prediction_takes_off_what_more_ranks_save() -> None:
    """Four H200 took 0.359 s for this request, where two took 0.516 (docs/performance.md)."""
    words = ["hw=h200x2", "hw.tensor_parallel=2", "model=llama13b", "model.dtype=bfloat16", "model.load_format=random"]
    config = compose(words, planning=True)
    assert original_table.predictable(config) and not original_table.predictable(compose(["hw=cpu"]))
    workload = {"tokens_in": 128, "tokens_out": 128, "batchinfer": {"seconds": 0.516, "first_token_s": 0.0073}}
    found = {"workloads": {"custom": workload}}
    seen = original_table.predict(Point("kernels", (), found), config)
    assert seen is not None and 128 / seen.tokens_s == pytest.approx(0.359, rel=0.1) and 3 < seen.first_token_ms < 7.3
    slower = original_table.predict(
        Point("plain", (), {"workloads": {"custom": {**workload, "batchinfer": {"seconds": 5.516, "first_token_s": 0.0573}}}}),
        config,
    )
    assert slower is not None and 128 / slower.tokens_s == pytest.approx(5 + 128 / seen.tokens_s)
    assert slower.first_token_ms == pytest.approx(50 + seen.first_token_ms)
    assert original_table.predict(Point("kernels", (), None, "it died"), config) is None


def test_what_failed_is_said_and_the_promise_is_judged() -> None:
    seen = {"hf": original_table.Seen(40.0, 30.0), "plain": None, "kernels": original_table.Seen(80.0, 15.0)}
    lines = list(original_table.table({**seen, "plain4": None, "kernels4": None}, ["plain4", "kernels4"]))
    assert lines[3].endswith("| failed |  |  |  |") and lines[4].endswith("| 80.0 | 15.0 ms | 2.00 | 2.00 |")
    assert original_table.verdict(seen).endswith("15.0 ms; under 100 ms everywhere is promised: kept")
    assert original_table.verdict({**seen, "plain": original_table.Seen(1.0, 101.0)}).endswith("NOT kept")
