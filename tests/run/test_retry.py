"""`retry`: only error rows are run again, as a new generation, whatever happens meanwhile. In float64, at temperature 0.8."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from tests.run.jobs import batchinfer, completions, kill, processes_of, start, texts, wait_until_gone
from tests.run.spoil import spoil

REQUEST = [
    "model.dtype=float64",
    "sampling.temperature=0.8",
    "sampling.max_tokens=12",
    "sampling.n=2",
    "sampling.logprobs=1",
    "sampling.prompt_logprobs=0",
    "input.limit=48",
    "input.rows_per_unit=8",
    "output.token_ids=true",
    "engine.max_num_seqs=8",
    "hw=cpu",
    "launcher=inline",
]
SHARD = "part-0.parquet"
SAMPLES = [(SHARD, 1, 0), (SHARD, 5, 1), (SHARD, 11, 0), (SHARD, 11, 1), (SHARD, 40, 1)]
ROWS = [(SHARD, 3), (SHARD, 12), (SHARD, 25)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = batchinfer(*REQUEST, f"output.dir={run_dir}")
    assert result.returncode == 0, result.stdout + result.stderr
    return run_dir


@pytest.fixture
def poisoned(undisturbed: Path, tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    spoil(run_dir, SAMPLES, ROWS)
    assert verify(RunDir(run_dir)) == []
    return run_dir


def rows_by_key(run_dir: Path) -> dict[tuple[str, int, int], dict]:
    return {(row["shard"], row["row"], row["sample"]): row for row in completions(run_dir).to_pylist()}


def assert_healed(run_dir: Path, undisturbed: Path) -> None:
    assert verify(RunDir(run_dir)) == []
    assert texts(run_dir) == texts(undisturbed)
    assert not wait_until_gone(run_dir, 30), "a process outlived its run"


def test_only_error_rows_are_run_again(poisoned: Path, undisturbed: Path) -> None:
    before = {path.name: path.read_bytes() for path in (poisoned / "completions").iterdir()}
    done = batchinfer("retry", poisoned)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retry: 8 error rows (bad_logits 8) in " in done.stdout
    assert "retry: 8 of 8 error rows have a completion now" in done.stdout
    assert_healed(poisoned, undisturbed)
    expected, found = rows_by_key(undisturbed), rows_by_key(poisoned)
    anew = {*SAMPLES, *((*row, sample) for row in ROWS for sample in range(2))}
    assert {key for key, row in found.items() if row["replica"] == "02-0-0"} == anew
    assert all(found[key] == expected[key] for key in expected.keys() - anew), "a good row is not what it was, to its times"
    assert all((poisoned / "replicas" / row["replica"] / "environment.json").exists() for row in found.values())
    for key in anew:  # what the model thought of the prompt, which only a row's first sample asks for
        assert [(t and t["token_id"]) for t in found[key]["prompt_logprobs"]] == [
            (t and t["token_id"]) for t in expected[key]["prompt_logprobs"]
        ]
    replaced = {path.name: path.read_bytes() for path in (poisoned / "superseded").iterdir()}
    assert replaced and replaced == {name: before[name] for name in replaced}
    untouched = {path.name: path.read_bytes() for path in (poisoned / "completions").glob("*.0.parquet")}
    assert untouched == {name: data for name, data in before.items() if name not in replaced}
    again = batchinfer("retry", poisoned)
    assert again.returncode == 0 and "no such error row, so nothing is run again" in again.stdout, again.stderr
    assert len(list((poisoned / "submissions").iterdir())) == 2


@pytest.mark.slow
def test_codes_and_refusals(poisoned: Path, undisturbed: Path) -> None:
    spoil(poisoned, [(SHARD, 30, 0)], code="bad_grammar")
    wrong = batchinfer("retry", poisoned, "retry.codes=[bad_logit]")
    assert wrong.returncode == 2 and "no error code 'bad_logit'; did you mean bad_logits?" in wrong.stderr
    wrong = batchinfer("retry", poisoned, "sampling.max_tokens=7")
    assert wrong.returncode == 2 and "sampling.max_tokens=7: cannot change when a run is resumed" in wrong.stderr
    nothing = batchinfer("retry", poisoned, "retry.codes=[null_prompt]")
    assert nothing.returncode == 0 and "no such error row" in nothing.stdout
    assert not (poisoned / "retries").exists() and not list((poisoned / "superseded").iterdir())
    one = batchinfer("retry", poisoned, "retry.codes=[bad_grammar]")
    assert one.returncode == 0 and "for such rows the same comes out again" in one.stdout
    assert [row["error"] for row in rows_by_key(poisoned).values()].count("bad_logits") == 8
    rest = batchinfer("retry", poisoned, "hw.gpus_per_node=2")
    assert rest.returncode == 0, rest.stderr
    assert_healed(poisoned, undisturbed)
    assert (poisoned / "superseded").glob("*.1.parquet")
    (poisoned / "completions" / "000000.1.parquet").unlink()
    missing = batchinfer("retry", poisoned)
    assert missing.returncode == 2 and "rows are missing; finish them first" in missing.stderr
    resumed = batchinfer("resume", poisoned)
    assert resumed.returncode == 0, resumed.stderr
    assert_healed(poisoned, undisturbed)


def test_two_retries_at_once(poisoned: Path, undisturbed: Path, tmp_path: Path) -> None:
    jobs = [start("retry", poisoned, log=tmp_path / f"{k}.log") for k in range(2)]
    while any(job.poll() is None for job in jobs):
        assert verify(RunDir(poisoned)) == [], "every row is there all the time"
    said = "".join((tmp_path / f"{k}.log").read_text() for k in range(2))
    assert [job.returncode for job in jobs] == [0, 0], said
    assert_healed(poisoned, undisturbed)
    assert max(int(path.name.split(".")[1]) for path in (poisoned / "completions").iterdir()) == 1, "nobody did it twice"


def killed_and_resumed(poisoned: Path, undisturbed: Path, tmp_path: Path, seed: int, kills: int) -> None:
    """All of a retry, or one of its processes, is killed at random moments; then it is finished with another layout."""
    rng = random.Random(seed)
    for number in range(kills):
        job = start(rng.choice(["retry", "resume"]), poisoned, log=tmp_path / f"{number}.log")
        time.sleep(rng.uniform(0.5, 5.0))
        pids = sorted({job.pid, *processes_of(poisoned)})
        kill(pids if rng.random() < 0.6 else [rng.choice(pids)])
        job.wait(timeout=60)
        assert verify(RunDir(poisoned)) == []
    done = batchinfer("retry", poisoned, "hw.gpus_per_node=2", "hw.tensor_parallel=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_healed(poisoned, undisturbed)


def test_a_killed_retry_is_taken_up(poisoned: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Between its first commit and its last, by `resume`, which has other hardware."""
    job = start("retry", poisoned, "engine.max_num_seqs=1", log=tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list((poisoned / "completions").glob("*.1.parquet")):
        assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    kill(sorted({job.pid, *processes_of(poisoned)}))
    job.wait(timeout=30)
    assert list((poisoned / "completions").glob("*.0.parquet"))
    assert verify(RunDir(poisoned)) == []
    other = batchinfer("retry", poisoned, "retry.codes=[null_prompt]")
    assert other.returncode == 2 and "an earlier retry, retry.codes=[], is not finished" in other.stderr
    assert batchinfer("status", poisoned).stdout.startswith("retry: ")
    resumed = batchinfer("resume", poisoned, "hw.gpus_per_node=2", "hw.tensor_parallel=2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_healed(poisoned, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("RETRY_SEEDS", "6"))))
def test_retry_kill_campaign(poisoned: Path, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    killed_and_resumed(poisoned, undisturbed, tmp_path, seed, 6)
