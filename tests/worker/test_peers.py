"""Ranks under a real torchrun, one of which dies while the others wait for it in a call that no signal interrupts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from batchinfer.job.node import NodeJob
from batchinfer.job.replica import read_death
from tests.job.test_launch_node import make_run

RANK = """
import os, signal, sys, time
import torch
from batchinfer.config import ConfigError
from batchinfer.model.parallel import init_distributed
from batchinfer.worker.peers import BEREAVED, PeerDied, Peers

def wait_for_ever():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as good as a wait for the device: no handler runs here
    time.sleep(100)

parallel = init_distributed(torch.device("cpu"))
peers = Peers.meet(parallel)
signal.signal(signal.SIGTERM, lambda *_: None)
"""


def run(folder: Path, body: str, ranks: int = 3) -> tuple[float, str, str]:
    """Seconds from the last word of the ranks to the end of the replica, why it died, and its log."""
    run_dir = make_run(folder)
    (folder / "fake_rank.py").write_text(RANK + body)
    number, _ = run_dir.new_submission()
    job = NodeJob(
        str(run_dir.root), number, 0, 1, ranks, (), worker_module="fake_rank", env={"PYTHONPATH": str(folder)}, cpus_per_rank=1
    )
    job()
    end = time.time()
    log = (run_dir.replica("01-0-0") / "log.txt").read_text()
    death = read_death(run_dir, "01-0-0")
    began = max((float(line.split("now ")[1]) for line in log.splitlines() if "now " in line), default=end)
    return end - began, death.reason if death else "", log


@pytest.mark.parametrize("culprit", [0, 2])
def test_the_others_end_in_a_moment_and_the_culprit_is_named(tmp_path: Path, culprit: int) -> None:
    body = f"""
with peers.watched():
    if parallel.rank == {culprit}:
        time.sleep(0.3)
        print("now", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_ever()
"""
    seconds, reason, log = run(tmp_path, body)
    assert reason.startswith(f"rank {culprit} was killed by SIGKILL")
    assert log.count("and this rank ends with it") == 2
    assert seconds < 5


def test_an_error_that_came_of_a_death_says_so(tmp_path: Path) -> None:
    """gloo breaks at once: rank 0, which torchrun asks first, ends with an error of its own beside the dead rank 1."""
    body = """
try:
    with peers.watched():
        if parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        parallel.all_reduce(torch.ones(1))
except PeerDied as error:
    print(error, flush=True)
    os._exit(BEREAVED)
"""
    _, reason, log = run(tmp_path, body, ranks=2)
    assert reason.startswith("rank 1 was killed by SIGKILL")
    assert "died before" in log or "and this rank ends with it" in log


def test_what_fails_of_itself_is_not_taken_for_a_death(tmp_path: Path) -> None:
    body = """
try:
    with peers.watched():
        if parallel.rank == 0:
            raise ConfigError("rank 0 has read it")
        wait_for_ever()
except ConfigError as error:
    sys.exit(f"batchinfer: {error}")
"""
    assert run(tmp_path, body, ranks=2)[1] == "rank 0 has read it"


def test_a_stop_is_not_a_death_and_nobody_goes_before_the_others_are_done(tmp_path: Path) -> None:
    """All had the signal; rank 0 is through first, and rank 1 takes its time."""
    body = """
with peers.watched():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5 * parallel.rank)
print("in order", flush=True)
parallel.close()
"""
    _, reason, log = run(tmp_path, body)
    assert reason == "" and log.count("in order") == 3 and "died" not in log


def test_one_rank_has_nobody_to_look_after(tmp_path: Path) -> None:
    _, reason, log = run(tmp_path, "with peers.watched():\n    print('alone', peers.dead())\n", ranks=1)
    assert reason == "" and "alone None" in log
