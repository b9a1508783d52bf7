"""A replica that stands still is ended in time, with every rank's stacks and the culprit named, and a fresh one goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from batchinfer.job.vitals import process_state
from tests.run.deaths import eventually, has_committed, rank_of
from tests.run.jobs import start, texts, wait_until_gone
from tests.run.test_rank_death import REQUEST

STALL_S = 3
ROWS = 40


def test_a_rank_that_stands_still_ends_the_replica_and_a_fresh_one_goes_on(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    tier = [f"input.limit={ROWS}", "hw=cpu", "hw.gpus_per_node=2", "hw.tensor_parallel=2", f"engine.stall_timeout_s={STALL_S}"]
    job = start(*REQUEST, *tier, "launcher=local", f"output.dir={run_dir}", log=log)
    eventually(lambda: has_committed(run_dir, "01-0-0"), 60)
    pid = rank_of(run_dir, "01-0-0", 1)
    assert pid is not None, "the run is over"
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    died = run_dir / "replicas" / "01-0-0" / "died.json"
    eventually(died.exists, 60)
    seconds = time.monotonic() - begin
    assert STALL_S <= seconds < STALL_S + 15, "a few seconds for the stacks, on a busy host"
    assert process_state(pid) is None
    assert job.wait(timeout=120) == 0, log.read_text()
    said = log.read_text()
    why = r"stood still for \d+ s: rank 1 (in|waiting for a batch after) step \d+ \(stopped by a signal\)"
    assert re.search(rf"replica 01-0-0 died \({why} at batchinfer/", said)
    assert "; restarted as 01-0-0.1; log: " in said
    for rank, entry in enumerate(("worker/replica.py", "engine/engine.py")):
        stacks = (died.parent / f"stacks-rank{rank}.txt").read_text()
        assert "(most recent call first)" in stacks and f"batchinfer/{entry}" in stacks
    assert verify(RunDir(run_dir)) == []
    assert len(texts(run_dir)) == ROWS
    assert not wait_until_gone(run_dir, 5)
