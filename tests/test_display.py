"""What `status` and the launching terminal say, from handmade progress files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.config import from_dict
from batchinfer.data.reader import InputSet
from batchinfer.data.schema import FOOTER_KEY, RowRange, Shard
from batchinfer.display import RunView, _picture, duration, line, status, watch
from batchinfer.job.claims import Identity
from batchinfer.job.failure import Cause, Failure, publish_failure
from batchinfer.job.manifest import Manifest
from batchinfer.job.replica import HOPELESS, Death, write_death
from batchinfer.job.retry import begin
from batchinfer.job.rundir import RunDir

CHECKED = {"model": {"path": "checkpoint"}, "input": {"paths": ["in"], "prompt_column": "prompt"}}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    units = [(RowRange(0, 1000 * i, 1000 * i + 1000),) for i in range(2)]
    shards = (Shard("a", 1, 2000, ""),)
    config = from_dict({"run_name": "test", **CHECKED})
    Manifest.create(run_dir, config, InputSet(tmp_path, shards, pa.schema([])), [], units, {})
    return run_dir


def commit(run_dir: RunDir, unit: int, errors: dict[str, int] | None = None, samples: int = 1000, generation: int = 0) -> None:
    footer = {
        "schema_version": 2,
        "unit": unit,
        "generation": generation,
        "rows": 1000,
        "samples": samples,
        "prompt_tokens": 9000,
        "completion_tokens": 50_000,
        "errors": errors or {},
        "content_hash": "",
        "input_hash": "",
        "replica": "01-0-0",
        "versions": {},
    }
    pq.write_table(pa.table({}).replace_schema_metadata({FOOTER_KEY: json.dumps(footer)}), run_dir.completion(unit, generation))


def test_line_of_a_retry(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    for unit in range(2):
        commit(run_dir, unit, {"bad_logits": 3 + unit})
    begin(run_dir, [])
    view = RunView(run_dir)
    assert line(view.look()) == "retry: 0/7 rows (0%), 0/2 units; 7 error rows (bad_logits 7)"
    assert status(run_dir) == 0 and capsys.readouterr().out.startswith("retry: 0/7 rows")
    commit(run_dir, 1, {"bad_logits": 1}, generation=1)
    assert line(view.look()) == "retry: 4/7 rows (57%), 1/2 units; 4 error rows (bad_logits 4)" and not view.look().is_complete
    commit(run_dir, 0, generation=1)
    assert line(view.look()) == "retry: 7/7 rows (100%), 2/2 units; 1 error rows (bad_logits 1); complete"
    assert line(RunView(run_dir).look()) == "2,000/2,000 rows (100%), 2/2 units; 1 error rows (bad_logits 1); complete"


def say(run_dir: RunDir, name: str, **progress: object) -> None:
    run_dir.replica(name).mkdir(exist_ok=True)
    run_dir.progress(name).write_text(json.dumps(progress))


def say_running(run_dir: RunDir, beat: int = 1) -> None:
    say(
        run_dir,
        "01-0-0",
        beat=beat,
        phase="running",
        rows_done=1200,
        prompt_tok_s=4000,
        completion_tok_s=1000.0,
        running=256,
        waiting=1024,
        kv_used=53,
        kv_total=100,
    )


def test_line_of_a_run_at_work(run_dir: RunDir) -> None:
    commit(run_dir, 0, {"null_prompt": 3})
    say_running(run_dir)
    assert line(RunView(run_dir).look()) == (
        "1,000/2,000 rows (50%), 1/2 units; 200 rows not yet committed; 1 replica (1 running); in 4,000 tok/s, out 1,000 tok/s; "
        "running 256, waiting 1,024; KV 53%; 3 error rows (null_prompt 3); about 40 s left"
    )


def test_heartbeat_age_is_by_the_observers_clock(run_dir: RunDir) -> None:
    now = 0.0
    view = RunView(run_dir, lambda: now)
    say_running(run_dir, beat=1)
    view.look()
    now = 50.0
    assert view.look().replicas[0].age_s == pytest.approx(50, abs=5)
    say_running(run_dir, beat=2)
    assert view.look().replicas[0].age_s == 0
    now = 120.0
    assert view.look().working == [], "silent for too long to count"


def test_a_replica_whose_process_is_gone_is_called_killed(run_dir: RunDir) -> None:
    here = dataclasses.asdict(Identity.here("01-0-0"))
    for name, phase, process in (
        ("01-0-0", "running", here),
        ("01-0-1", "running", {**here, "started": here["started"] - 1}),  # the pid is another process's by now
        ("01-0-2", "done", {**here, "started": here["started"] - 1}),
        ("01-0-3", "running", {**here, "started": 0, "host": "elsewhere"}),  # nobody can tell from here
    ):
        say(run_dir, name, beat=1, phase=phase, process=process)
    snapshot = RunView(run_dir).look()
    assert [replica.phase for replica in snapshot.replicas] == ["running", "killed", "done", "running"]
    assert [replica.name for replica in snapshot.working] == ["01-0-0", "01-0-3"]


def test_status_prints_once(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    say_running(run_dir)
    run_dir.replica("01-0-1").mkdir()
    assert status(run_dir, False) == 0
    first, *replicas = capsys.readouterr().out.splitlines()
    assert first.startswith("0/2,000 rows") and "2 replicas (1 running, 1 starting)" in first
    assert replicas[0].startswith("  01-0-0: running, 1,200 rows") and "01-0-1: starting" in replicas[1]


def test_watch_ends_when_complete_and_tells_deaths(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    say(run_dir, "00-0-0", phase="failed")
    write_death(run_dir, Death("00-0-0", 1, "of an earlier submission", "old.txt"))

    def jobs_alive() -> bool:
        say_running(run_dir)
        write_death(run_dir, Death("01-0-0", 1, "out of memory", "/run/log.txt", "01-0-0.1"))
        commit(run_dir, 0)
        commit(run_dir, 1)
        return True

    assert watch(run_dir, jobs_alive, told.append).is_complete
    assert told == ["replica 01-0-0 died (out of memory); restarted as 01-0-0.1; log: /run/log.txt"]
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("0/2,000 rows") and last == "2,000/2,000 rows (100%), 2/2 units; complete"


def test_a_failed_submission_is_told_and_not_watched_any_longer(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """A death that is not judged yet is nobody's news; the next submission begins anew."""
    run_dir.replica("01-0-0").mkdir()
    run_dir.submission(1).mkdir()
    looks = iter([True, False])

    def jobs_alive() -> bool:
        write_death(run_dir, Death("01-0-0", HOPELESS, "the input changed", "log.txt", node="n1", early=True, undecided=True))
        return next(looks)

    watch(run_dir, jobs_alive)
    assert "died" not in capsys.readouterr().err
    publish_failure(run_dir, 1, Failure("the input changed", Cause.REQUEST, "01-0-0", "n1", "log.txt"))
    for keep_watching in (False, True):
        assert status(run_dir, keep_watching) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("failed: the input changed (found by replica 01-0-0 on n1; log: log.txt); ")
    run_dir.submission(2).mkdir()
    status(run_dir)
    assert "failed:" not in capsys.readouterr().out


def test_watch_ends_when_no_job_is_alive(run_dir: RunDir) -> None:
    assert not watch(run_dir, lambda: False).is_complete


def test_picture_for_a_terminal(run_dir: RunDir) -> None:
    from rich.console import Console

    say_running(run_dir)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(_picture(RunView(run_dir).look()))
    assert "01-0-0" in (text := console.export_text()) and "53%" in text and "heartbeat" in text


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 7620)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]
