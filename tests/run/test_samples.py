"""Several samples a row through the whole job, with penalties and log-probabilities: what a bare engine says, killed or not."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import batchinfer as package
from batchinfer.data.prompts import row_seed
from batchinfer.engine.engine import build_engine
from batchinfer.engine.sequence import Request, SamplingParams, TokenLogprobs
from batchinfer.job.manifest import Manifest
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from tests.run.jobs import batchinfer, completions, kill, processes_of, start, texts

MODEL = Path(package.__file__).parent / "tiny" / "model"
SAMPLES, SEED = 3, 11

# What a row asks for, and what the engine should be told; None: the row is an error.
ASKED: list[tuple[str | None, dict[str, Any] | None]] = [
    (None, {}),
    ('{"n": 1}', {}),
    ('{"n": 4, "seed": 4, "temperature": 0}', {"temperature": 0.0}),
    ('{"repetition_penalty": 1.7}', {"repetition_penalty": 1.7}),
    ('{"presence_penalty": 1.5, "frequency_penalty": -0.5}', {"presence_penalty": 1.5, "frequency_penalty": -0.5}),
    ('{"logprobs": 0, "prompt_logprobs": 3}', {"logprobs": 0, "prompt_logprobs": 3}),
    ('{"logprobs": 5, "prompt_logprobs": null, "stop": "e"}', {"logprobs": 5, "stop": ("e",)}),
    ('{"n": 0}', None),
    ('{"logprobs": 1000}', None),
]
PROMPTS = ["Return the ", "def f(x):\n", "The list of ", "Read a file"]
ROWS = 2 * len(ASKED)


def inputs() -> pa.Table:
    """Every kind of row twice, with two prompts."""
    return pa.table(
        {
            "id": pa.array([f"row {k}" for k in range(ROWS)]).dictionary_encode(),
            "prompt": [PROMPTS[k % len(PROMPTS)] for k in range(ROWS)],
            "how": pa.array([ASKED[k % len(ASKED)][0] for k in range(ROWS)], pa.string()),
            "nested": pa.array([{"k": [k, None]} if k % 3 else None for k in range(ROWS)]),
        }
    )


def request(folder: Path, *overrides: str) -> list[str]:
    return [
        "hw=cpu",
        "hw.cpus_per_gpu=1",
        "input=parquet",
        f"input.paths=['{folder / 'in.parquet'}']",
        "input.prompt_column=prompt",
        "input.sampling_column=how",
        "input.rows_per_unit=2",
        "model.dtype=float64",
        f"seed={SEED}",
        "sampling.temperature=0.8",
        "sampling.max_tokens=10",
        f"sampling.n={SAMPLES}",
        "sampling.logprobs=2",
        "sampling.prompt_logprobs=1",
        "output.token_ids=true",
        "engine.max_num_seqs=8",
        *overrides,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    pq.write_table(inputs(), folder / "in.parquet")
    return folder


@pytest.fixture(scope="module")
def job(folder: Path) -> Path:
    run_dir = folder / "run"
    done = batchinfer(*request(folder), "launcher=inline", f"output.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(RunDir(run_dir)) == []
    return run_dir


def samples_of(index: int) -> int:
    override, told = ASKED[index % len(ASKED)]
    return 1 if told is None else json.loads(override or "{}").get("n", SAMPLES)


def test_every_row_has_its_samples_and_its_columns(job: Path) -> None:
    table = completions(job)
    rows = table.to_pylist()
    order = [(k, sample) for k in range(ROWS) for sample in range(samples_of(k))]
    assert [(row["row"], row["sample"]) for row in rows] == order
    given = inputs()
    for name in given.column_names:
        expected = pa.concat_tables([given.select([name]).slice(k, 1) for k, _ in order])
        assert table.schema.field(name).type == given.schema.field(name).type
        assert table.column(name).to_pylist() == expected.column(name).to_pylist(), name
    assert {row["row"]: row["error"] for row in rows if row["error"]} == {
        k: "bad_sampling" for k in range(ROWS) if ASKED[k % len(ASKED)][1] is None
    }
    drawn = {tuple(row["token_ids"]) for row in rows if row["row"] == 0}
    assert len(drawn) > 1, "samples are drawn apart"
    greedy = {tuple(row["token_ids"]) for row in rows if row["row"] == 2}
    assert len(greedy) == 1


def test_totals_tell_rows_from_samples(job: Path) -> None:
    summary = json.loads((job / "report" / "summary.json").read_text())
    samples = sum(map(samples_of, range(ROWS)))
    assert (summary["rows"], summary["rows_total"], summary["samples"]) == (ROWS, ROWS, samples)
    stats = pa.concat_tables([pq.read_table(path) for path in sorted((job / "stats").glob("*.parquet"))])
    rows = completions(job)
    prompts = sum(stats["prefill_tokens"].to_pylist()) + sum(stats["prefix_hit_tokens"].to_pylist())
    assert prompts == sum(rows["num_prompt_tokens"].to_pylist()) == summary["prompt_tokens"]
    assert sum(stats["decode_tokens"].to_pylist()) == sum(rows["num_completion_tokens"].to_pylist())
    said = batchinfer("status", job).stdout
    assert f"{ROWS}/{ROWS} rows (100%)" in said and f"{samples} samples" in said
    told = batchinfer("report", job).stdout.splitlines()
    assert f"samples:             {samples}" in told
    assert [line.split('"')[0] for line in told[-3:]] == [f"in.parquet:{k}: " for k in range(3)], "one sample of each row"


def test_the_plan_counts_every_sample(folder: Path) -> None:
    said = batchinfer("plan", *request(folder)).stdout
    assert f"{ROWS * SAMPLES}, {SAMPLES} of each row" in said
    counted = re.search(r"\ncompletion tokens: +about (\d+) at full length", said)
    assert counted is not None and int(counted[1]) == pytest.approx(400, rel=0.3), (
        "40 samples of 10 tokens, from some of the rows"
    )


def bare_engine(job: Path) -> dict[tuple[int, int], tuple[list[int], list[TokenLogprobs], list[TokenLogprobs | None] | None]]:
    """(row, sample) -> tokens, theirs and the prompt's log-probabilities, without any of the job around the engine."""
    config = Manifest.load(RunDir(job)).config
    engine = build_engine(config, load_shape(config.model), TensorParallel(), torch.device("cpu"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    base = {"temperature": 0.8, "max_tokens": 10, "logprobs": 2, "prompt_logprobs": 1}
    names = {}
    for k in range(ROWS):
        override, told = ASKED[k % len(ASKED)]
        if told is None:
            continue
        seed = json.loads(override or "{}").get("seed", SEED)
        prompt = tokenizer(PROMPTS[k % len(PROMPTS)])["input_ids"]
        for sample in range(samples_of(k)):
            names[len(names)] = (k, sample)
            params = SamplingParams(**(base | told))
            engine.add(Request(len(names) - 1, prompt, params, row_seed(seed, "in.parquet", k, sample)))
    found: dict[Any, Any] = {name: ([], [], None) for name in names.values()}
    while engine.has_work():
        for output in engine.step()[0]:
            tokens, logprobs, prompt = found[names[output.request_id]]
            tokens += output.token_ids
            logprobs += output.logprobs or []
            found[names[output.request_id]] = tokens, logprobs, prompt or output.prompt_logprobs
    engine.close()
    return found


def assert_told(found: list[dict[str, Any] | None], expected: list[TokenLogprobs | None]) -> None:
    assert len(found) == len(expected)
    for one, token in zip(found, expected, strict=True):
        assert (one is None) == (token is None)
        if one is not None and token is not None:
            assert (one["token_id"], one["rank"]) == (token.token_id, token.rank)
            assert one["logprob"] == pytest.approx(token.logprob, rel=1e-6)
            assert [likely["token_id"] for likely in one["top"]] == [token_id for token_id, _ in token.top]
            assert [likely["logprob"] for likely in one["top"]] == pytest.approx([value for _, value in token.top], rel=1e-6)


def test_the_job_says_what_a_bare_engine_says(job: Path) -> None:
    expected = bare_engine(job)
    for row in completions(job).to_pylist():
        if row["error"] is not None:
            assert row["token_ids"] is row["logprobs"] is row["prompt_logprobs"] is None
            continue
        tokens, logprobs, prompt = expected[row["row"], row["sample"]]
        count = len(row["token_ids"])  # a stop string may have ended it sooner
        assert row["token_ids"] == tokens[:count] and (count == len(tokens) or "stop" in str(row["how"]))
        assert_told(row["logprobs"], list(logprobs[:count]))
        assert prompt is not None
        assert_told(row["prompt_logprobs"], prompt)
        assert row["prompt_logprobs"][0] is None and len(row["prompt_logprobs"]) == row["num_prompt_tokens"]


def test_the_first_sample_is_what_a_run_of_one_draws(job: Path, folder: Path) -> None:
    run_dir = folder / "one"
    plain = ["sampling.n=1", "sampling.logprobs=null", "sampling.prompt_logprobs=null"]
    done = batchinfer(*request(folder, *plain), "input.sampling_column=null", "launcher=inline", f"output.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "logprobs" not in completions(run_dir).column_names
    first = {row["row"]: row["token_ids"] for row in completions(job).to_pylist() if row["sample"] == 0}
    one = {row["row"]: row["token_ids"] for row in completions(run_dir).to_pylist()}
    for k in range(ROWS):
        if ASKED[k % len(ASKED)][0] in (None, '{"n": 1}'):
            assert first[k] == one[k]


def test_killed_and_resumed_it_draws_the_same(job: Path, folder: Path) -> None:
    run_dir = folder / "killed"
    launched = start(*request(folder), "launcher=inline", f"output.dir={run_dir}", log=folder / "killed.log")
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("completions/[0-9]*.parquet")):
        assert time.monotonic() < deadline and launched.poll() is None, (folder / "killed.log").read_text()
        time.sleep(0.002)
    kill(sorted({launched.pid, *processes_of(run_dir)}))
    launched.wait()
    left = len(Manifest.load(RunDir(run_dir)).units) - len(list(run_dir.glob("completions/[0-9]*.parquet")))
    assert left > 0, "it was killed too late"
    done = batchinfer("resume", run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(RunDir(run_dir)) == []
    assert texts(run_dir) == texts(job)
    for name in ("logprobs", "prompt_logprobs"):
        assert completions(run_dir)[name].to_pylist() == completions(job)[name].to_pylist()
