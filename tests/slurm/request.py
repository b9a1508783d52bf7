"""What the scenarios on the cluster run, and how they submit it and see it through."""

from __future__ import annotations

import json
from pathlib import Path

from tests.run.jobs import batchinfer, texts
from tests.slurm.cluster import Cluster, eventually

# In float64 no near-tie can fall the other way.
REQUEST = [
    "model.dtype=float64",
    "sampling.temperature=0.8",
    "sampling.max_tokens=24",
    "input.limit=64",
    "input.rows_per_unit=4",
    "output.token_ids=true",
    "engine.max_num_seqs=6",
    "engine.max_num_batched_tokens=64",
    "engine.stall_timeout_s=10",
    "hw=cpu",
]
HOST = Path(__file__).parents[1] / "run/host"
PATIENCE_S = 200  # of a machine that does much else


def on_slurm(run_dir: Path) -> list[str]:
    """The request as jobs that are called as the folder is, and slowed until `at_full_speed`."""
    _slow(run_dir, 0.1)
    slowed = f"hw.env={{PYTHONPATH: '{HOST}', SLOWED_BY: '{_slowed_by(run_dir)}'}}"
    return [*REQUEST, "launcher=slurm", f"output.dir={run_dir}", f"run_name={run_dir.name}", slowed]


def at_full_speed(run_dir: Path) -> None:
    """What was to happen has happened."""
    _slowed_by(run_dir).unlink(missing_ok=True)


def _slow(run_dir: Path, step_s: float) -> None:
    """Each step takes so much longer."""
    new = run_dir.with_name("slowed.new")
    new.write_text(str(step_s))
    new.replace(_slowed_by(run_dir))


def _slowed_by(run_dir: Path) -> Path:
    return run_dir.with_name("slowed")


def submit(run_dir: Path, *overrides: str) -> str:
    """Places the jobs and returns; the id of the first."""
    done = batchinfer(*on_slurm(run_dir), "launcher.wait=false", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    newest = max((run_dir / "submissions").iterdir())
    return json.loads((newest / "submission.json").read_bytes())["jobs"][0]


def committed(run_dir: Path) -> int:
    return len(list((run_dir / "completions").glob("[0-9]*.parquet")))


def in_the_middle(run_dir: Path, units: int = 2) -> None:
    """Waits until work has been committed, while most is left to do; and leaves time, minutes, for what is to happen."""
    _slow(run_dir, 0.1)
    eventually(lambda: committed(run_dir) >= units, PATIENCE_S, lambda: logs(run_dir))
    assert not is_complete(run_dir), "the run is over before anything could happen to it"
    _slow(run_dir, 0.8)


def is_complete(run_dir: Path) -> bool:
    return committed(run_dir) >= len(json.loads((run_dir / "manifest.json").read_bytes())["units"])


def ended_well(cluster: Cluster, run_dir: Path, undisturbed: dict, rows: int = 64) -> None:
    """The run completes by itself, every row is there once, and the first `rows` say what they say in an undisturbed run."""
    at_full_speed(run_dir)
    eventually(lambda: is_complete(run_dir), PATIENCE_S, lambda: f"{cluster.jobs('%i %T %r %N')} {logs(run_dir)}")
    verified = batchinfer("verify", run_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert texts(run_dir) == {key: undisturbed[key] for key in sorted(undisturbed)[:rows]}


def replicas(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "replicas").iterdir())


def hosts(run_dir: Path) -> set[str]:
    """Where replicas have been."""
    records = (run_dir / "replicas").glob("*/progress.json")
    return {json.loads(path.read_bytes())["process"]["host"] for path in records}


def logs(run_dir: Path) -> str:
    """What the jobs and their replicas said."""
    paths = [*run_dir.glob("submissions/*/*_log.out"), *run_dir.glob("replicas/*/log.txt")]
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(paths))
