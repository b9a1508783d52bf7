from __future__ import annotations

from pathlib import Path

from batchinfer.job.logs import LogFollower
from batchinfer.job.rundir import RunDir


def test_every_whole_line_comes_once_and_other_submissions_stay_out(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for name in ("01-0-0", "02-0-0", "02-0-1"):
        run_dir.replica(name).mkdir(parents=True)
    follower = LogFollower(run_dir, 2)
    assert list(follower.lines()) == []
    (run_dir.replica("01-0-0") / "log.txt").write_text("old\n")
    log = run_dir.replica("02-0-1") / "log.txt"
    log.write_text("one\ntw")
    assert list(follower.lines()) == ["02-0-1 one"]
    log.write_text("one\ntwo\n")
    assert list(follower.lines()) == ["02-0-1 two"]
    assert list(follower.lines()) == []
