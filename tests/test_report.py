"""The report on handmade completions, statistics and progress files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.config import from_dict
from batchinfer.data.reader import InputSet
from batchinfer.data.schema import FOOTER_KEY, RowRange, Shard
from batchinfer.engine.sequence import StepStats
from batchinfer.job.manifest import Manifest
from batchinfer.job.rundir import RunDir
from batchinfer.report import LogHistogram, report, summarise, table
from batchinfer.stats import StepRecorder

CHECKED = {"model": {"path": "checkpoint"}, "input": {"paths": ["in"], "prompt_column": "prompt"}}


def commit(run_dir: RunDir, unit: int, generation: int, completions: list[str | None]) -> None:
    rows = len(completions)
    bad = sum(text is None for text in completions)
    footer = {
        "schema_version": 2,
        "unit": unit,
        "generation": generation,
        "rows": rows,
        "samples": rows,
        "prompt_tokens": 10 * rows,
        "completion_tokens": 5 * (rows - bad),
        "errors": {"null_prompt": bad} if bad else {},
        "content_hash": "",
        "input_hash": "",
        "replica": "01-0-0",
        "versions": {},
    }
    columns = {
        "x_shard": pa.array(["a.parquet"] * rows),
        "x_row": pa.array(range(rows)),
        "x_sample": pa.array([0] * rows),
        "x_completion": pa.array(completions, pa.string()),
        "x_error": pa.array(["null_prompt" if text is None else None for text in completions], pa.string()),
        "x_error_message": pa.array([f"why {i}" if text is None else None for i, text in enumerate(completions)], pa.string()),
        "x_finish_reason": pa.array(["error" if text is None else "stop" for text in completions]),
        "x_ttft_s": pa.array([None if text is None else 1.0 for text in completions], pa.float64()),
        "x_latency_s": pa.array([None if text is None else 3.0 for text in completions], pa.float64()),
        "x_num_completion_tokens": pa.array([0 if text is None else 5 for text in completions], pa.int32()),
    }
    table = pa.table(columns).replace_schema_metadata({FOOTER_KEY: json.dumps(footer)})
    pq.write_table(table, run_dir.completion(unit, generation))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """Two of three units are done, one of them twice; two replicas, of which one went idle three seconds before the other."""
    run_dir = RunDir(tmp_path / "run")
    config = from_dict({"run_name": "test", "output": {"prefix": "x_"}, **CHECKED})
    units = [(RowRange(0, 3 * i, 3 * i + 3),) for i in range(3)]
    Manifest.create(run_dir, config, InputSet(tmp_path, (Shard("a.parquet", 1, 9, ""),), pa.schema([])), [], units, {})
    commit(run_dir, 0, 0, [None, None, None])
    commit(run_dir, 0, 1, ["One\nline", None, "y" * 1000])
    commit(run_dir, 1, 0, ["Third", "Fourth", None])
    for name, last in (("01-0-0", 8), ("01-0-1", 5)):
        (run_dir.replica(name)).mkdir()
        progress = {"beat": 1, "phase": "done", "rows_done": 3, "phases": {"load": 2.5, "first_token": 4.0}}
        times = {"idle_since": 100.0 + last, "last_commit": 100.0 + last - 0.5}
        run_dir.progress(name).write_text(json.dumps(progress | times))
        gpus = [{"gpu": "h200", "memory_bytes": 1, "uuid": f"GPU-{i}"} for i in range(2)]  # both replicas name the same two
        environment = {"host": "a", "gpus": gpus, "driver": "570.1", "git_commit": "0123456789abcdef-dirty"}
        run_dir.environment(name).write_text(json.dumps(environment | {"versions": {"torch": "2.11"}}))
        recorder = StepRecorder(run_dir, name)
        for number in range(last):
            recorder.record(
                StepStats(
                    number,
                    100.0 + number,
                    1.0,
                    prefill_seqs=1,
                    decode_seqs=3,
                    prefill_tokens=2,
                    prefix_hit_tokens=6,
                    kv_blocks_used=number,
                    kv_blocks_total=10,
                    preempted=number == 1,
                )
            )
        recorder.flush()
    return run_dir


def test_summary(run_dir: RunDir) -> None:
    summary = summarise(run_dir)
    assert (summary["rows"], summary["rows_total"], summary["units"], summary["complete"]) == (6, 9, 2, False)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (60, 20)
    first = str(run_dir.completion(0, 1))
    example = {"shard": "a.parquet", "row": 1, "sample": 0, "error_message": "why 1", "first_in": first}
    assert (summary["error_rows"], summary["errors"]) == (2, {"null_prompt": {"rows": 2, **example}})
    assert summary["finish_reasons"] == {"error": 2, "stop": 4}
    assert (summary["wall_s"], summary["rows_s"], summary["tokens_out_s"]) == (8.0, 6 / 8, 20 / 8)
    assert (summary["tail_s"], summary["tails_s"]) == (2.5, {"01": 2.5})
    assert (summary["steps"], summary["mean_batch_size"], summary["kv_peak_share"], summary["preemptions"]) == (13, 4.0, 0.7, 2)
    assert (summary["prefill_tokens"], summary["prefix_hit_tokens"]) == (26, 78)
    assert summary["ttft_s"]["p50"] == pytest.approx(1.0, rel=0.003)
    assert summary["latency_s"]["p99"] == pytest.approx(3.0, rel=0.003)
    assert summary["inter_token_s"]["p90"] == pytest.approx(0.5, rel=0.003)
    assert summary["replicas"]["01-0-1"]["phases_s"] == {"load": 2.5, "first_token": 4.0}


def test_report_is_plain_without_a_terminal(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(run_dir) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "6 of 9 (2 of 3 units)" in out and "first_token 4.0 s" in out
    assert 'error null_prompt:   2 rows, the first a.parquet:1: "why 1"\n' in out
    retry = f"python -m batchinfer retry {run_dir.root} (with the same result, unless the program has changed)"
    assert f"run them again:      {retry}\n" in out
    assert "made on:             1 host, 2 x h200, driver 570.1, torch 2.11, commit 0123456789ab-dirty\n" in out
    assert "prefix cache:        78 prompt tokens (75%) found there, 26 computed\n" in out
    lines = out.splitlines()[-3:]
    assert lines[0] == 'a.parquet:0: "One\\nline"'
    assert lines[1].endswith('y…"') and len(lines[1]) < 230
    assert lines[2] == 'a.parquet:0: "Third"'
    assert json.loads((run_dir.report / "summary.json").read_text()) == summarise(run_dir)


EXPECTED = {"tokens_out_s": 3.0, "completion_tokens": 45, "sequences": 9, "kv_tokens": 150, "gpu_memory_bytes": 40 << 30}
EXPECTED |= {"gpu": "h200", "gpus": 2, "ranks": 1, "block_size": 16}


def submitted(run_dir: RunDir, *expected: dict | None) -> None:
    for number, record in enumerate(expected, 1):
        run_dir.submission(number).mkdir()
        run_dir.submission_json(number).write_text(json.dumps({"kind": "local", "expected": record}))


def test_predicted_beside_actual(run_dir: RunDir) -> None:
    """Two replicas of 10 blocks; 4 rows of 5 tokens each in 8 seconds; no driver told of memory."""
    submitted(run_dir, EXPECTED, EXPECTED)
    summary = summarise(run_dir)
    assert summary["predicted"] == {
        "tokens_out_s": {"predicted": 3.0, "actual": 20 / 8},
        "completion_tokens_a_sequence": {"predicted": 5.0, "actual": 5.0},
        "kv_tokens": {"predicted": 150, "actual": 160},
        "gpu_memory_bytes": {"predicted": 40 << 30, "actual": None},
    }
    lines = dict(table(summary))
    assert lines["throughput"] == "2 tokens/s out, predicted 3 tokens/s out (-16.7%)"
    assert lines["KV cache"] == "160 tokens a replica, predicted 150 tokens a replica (+6.7%)"
    assert "GPU memory" not in lines


def test_memory_that_the_driver_told_and_completions_that_were_short(run_dir: RunDir) -> None:
    submitted(run_dir, EXPECTED | {"completion_tokens": 90})
    path = run_dir.stats / "01-0-1-000000.parquet"
    told = pq.read_table(path)
    column = told.schema.get_field_index("gpu_memory_bytes")
    pq.write_table(told.set_column(column, "gpu_memory_bytes", pa.array([1 << 30, 44 << 30] + [None] * 3, pa.int64())), path)
    lines = dict(table(summarise(run_dir)))
    assert lines["GPU memory"] == "44.0 GiB, predicted 40.0 GiB (+10.0%)"
    assert lines["throughput"].endswith("(-16.7%), for completions at full length: these have 50% of it")


@pytest.mark.parametrize("expected", [(), (None,), (EXPECTED, None), (EXPECTED, EXPECTED | {"ranks": 2})])
def test_nothing_is_compared_without_a_prediction_or_with_several(run_dir: RunDir, expected: tuple) -> None:
    submitted(run_dir, *expected)
    summary = summarise(run_dir)
    assert summary["predicted"] is None and not {"throughput", "KV cache", "GPU memory"} & dict(table(summary)).keys()


def test_report_of_a_run_that_has_nothing_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = RunDir(tmp_path / "run")
    shards = (Shard("a", 1, 1, ""),)
    config = from_dict({"run_name": "test", **CHECKED})
    Manifest.create(run_dir, config, InputSet(tmp_path, shards, pa.schema([])), [], [(RowRange(0, 0, 1),)], {})
    assert report(run_dir) == 0
    assert "0 of 1 (0 of 1 units)" in capsys.readouterr().out


def test_histogram_quantiles_are_near_the_exact_ones() -> None:
    values = np.random.default_rng(0).lognormal(0, 2, 10_000)
    histogram = LogHistogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    histogram.add(np.array([]))
    for q in (0.01, 0.5, 0.9, 0.99):
        assert histogram.quantile(q) == pytest.approx(np.quantile(values, q, method="inverted_cdf"), rel=0.003)
    assert LogHistogram().quantile(0.5) is None
