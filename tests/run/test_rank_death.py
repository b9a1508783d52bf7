"""A rank of a tensor-parallel replica is killed in the middle of a step: the job goes on with a fresh replica, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.deaths import kill_rank
from tests.run.jobs import batchinfer, start, texts, wait_until_gone

REQUEST = [
    "model.dtype=float64",  # in which no near-tie can fall the other way
    "input.limit=80",
    "input.rows_per_unit=4",
    "sampling.max_tokens=24",
    "engine.max_num_seqs=8",
    "output.token_ids=true",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = batchinfer(*REQUEST, "hw=cpu", "launcher=inline", f"output.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    return texts(run_dir)


def test_a_killed_rank_is_named_and_a_fresh_replica_goes_on(undisturbed: dict, tmp_path: Path) -> None:
    """First a follower, then, in the fresh replica, the rank that owns the rows."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    tier = ["hw=cpu", "hw.gpus_per_node=2", "hw.tensor_parallel=2"]
    job = start(*REQUEST, *tier, "launcher=local", f"output.dir={run_dir}", log=log)
    seconds = [kill_rank(1, run_dir, "01-0-0", "01-0-0.1"), kill_rank(0, run_dir, "01-0-0.1", "01-0-0.2")]
    assert job.wait(timeout=120) == 0, log.read_text()
    said = log.read_text()
    for rank, name in ((1, "01-0-0"), (0, "01-0-0.1")):
        assert f"replica {name} died (rank {rank} was killed by SIGKILL" in said
    assert max(seconds) < 10, "torchrun would kill who does not end by itself after 30 s"
    verified = batchinfer("verify", run_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert texts(run_dir) == undisturbed
    assert not wait_until_gone(run_dir, 5)
