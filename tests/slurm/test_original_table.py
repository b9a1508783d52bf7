"""The original design's table, from its three benches to its ratios, and the prediction for four GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.bench.points import Point
from batchinfer.compose import compose
from batchinfer.job.plan import resolved
from slurm.bench import original_table

CPU = ["hw=cpu", "hw.cpus_per_gpu=1"]


@pytest.mark.slow
def test_the_original_table_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lengths", "16", "4", "--steps", "1", "--out", str(tmp_path), *CPU, "hw.gpus_per_node=2", "model=tiny"]
    assert original_table.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:7]] == [
        ["| Hugging Face, one GPU", "35", "120 ms", "1.00"],
        ["| tensor parallel 2, plain PyTorch", "55", "85 ms", "1.57"],
        ["| tensor parallel 2, our kernels", "65", "70 ms", "1.86"],
        ["| tensor parallel 4, plain PyTorch (predicted)", "120", "40 ms", "3.43"],
        ["| tensor parallel 4, our kernels (predicted)", "150", "30 ms", "4.29"],
    ]
    assert lines[-1].startswith("first token of ours after at most ")
    plain = json.loads((tmp_path / "plain.json").read_text())["conditions"]["engine"]
    assert (plain["attention_backend"], plain["cuda_graphs"]) == ("reference", False)
    assert json.loads((tmp_path / "kernels.json").read_text())["conditions"]["engine"]["attention_backend"] == "auto"


def test_one_gpu_is_too_few_for_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert original_table.main(["--out", str(tmp_path), *CPU]) == 2
    assert "hw.gpus_per_node=1: must be at least 2" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_prediction_by_hand() -> None:
    """Weights, two tokens of KV and all-reduces are all that costs anything; what is beyond the floor stays."""
    words = [
        "hw=cpu",
        "hw.gpus_per_node=2",
        "hw.tensor_parallel=2",
        "bench.num_requests=1",
        "bench.input_len=1",
        "bench.output_len=2",
    ]
    config = resolved(compose(words))
    shape = original_table.load_shape(config.model)
    two, four = (original_table.Cost.of(shape, config.model.dtype, ranks).weight_bytes(1) for ranks in (2, 4))
    ceilings = {"read": 1e6, "copy": 1e6, "gemm": [[1, 1e30]], "attention": 1e30, "all_reduce": [[1, 1e-4], [1 << 30, 1e-4]]}
    reduces, kv = 2 * shape.num_layers * 1e-4, shape.kv_bytes_per_token(config.model.dtype, 2) / 1e6
    own = {"seconds": 2 * (two / 1e6 + reduces) + 2 * kv + 0.3, "first_token_s": two / 1e6 + reduces + 0.1}
    found = {"ceilings": ceilings, "kv_tokens": 1000, "workloads": {"custom": {"batchinfer": own}}}
    seen = original_table.predict(Point("kernels", (), found), config)
    assert seen is not None
    assert seen.first_token_ms == pytest.approx(1e3 * (four / 1e6 + 1.5 * reduces + 0.1))
    assert 2 / seen.tokens_s == pytest.approx(2 * (four / 1e6 + 1.5 * reduces) + kv + 0.3)
    assert original_table.predict(Point("kernels", (), None, "it died"), config) is None


def test_what_failed_is_said_and_the_promise_is_judged() -> None:
    seen = {"hf": original_table.Seen(40.0, 30.0), "plain": None, "kernels": original_table.Seen(80.0, 15.0)}
    lines = list(original_table.table({**seen, "plain4": None, "kernels4": None}, ["plain4", "kernels4"]))
    assert lines[3].endswith("| failed |  |  |  |") and lines[4].endswith("| 80.0 | 15.0 ms | 2.00 | 2.00 |")
    assert original_table.verdict(seen).endswith("15.0 ms; under 100 ms everywhere is promised: kept")
    assert original_table.verdict({**seen, "plain": original_table.Seen(1.0, 101.0)}).endswith("NOT kept")
