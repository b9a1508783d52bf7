"""The cluster for tests, and a run that nothing disturbed to compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run.jobs import batchinfer, texts
from tests.slurm import cluster as slurm
from tests.slurm.request import REQUEST


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[slurm.Cluster]:
    """Skips where there can be none; in CI that is a failure."""
    obstacle = slurm.obstacle()
    if obstacle and os.environ.get("CI") == "true":
        pytest.fail(f"CI needs a SLURM: {obstacle}")
    if obstacle:
        pytest.skip(obstacle)
    with slurm.shared() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    """Found by whatever the test starts, and by nothing else in this process."""
    monkeypatch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
    return running_cluster


@pytest.fixture
def run_dir(cluster: slurm.Cluster, tmp_path: Path) -> Iterator[Path]:
    """Its name is that of its jobs, none of which outlives the test."""
    path = tmp_path / tmp_path.name
    yield path
    cluster.ask("scancel", f"--name={path.name}")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = batchinfer(*REQUEST, "launcher=inline", f"output.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    return texts(run_dir)
