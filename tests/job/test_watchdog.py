"""When a replica counts as standing still, whose fault it is, and that it is ended then, with its stacks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.job.process import MARK, marked
from batchinfer.job.vitals import FOLDER, Phase, Pulse, Reading, Vitals
from batchinfer.job.watchdog import SLOW_TIMES, Still, Stillness, Watchdog, culprits, innermost, kernel_view, verdict

TIMEOUT_S = 30.0
LEADER = Reading(rank=0, beats=7, step=5, phase=Phase.STEPPING, pid=100)
FOLLOWER = Reading(rank=1, beats=9, step=5, phase=Phase.FOLLOWING, pid=101)


def seconds_until_stall(readings: Iterator[list[Reading]], look_s: float = 0.5) -> float:
    stillness, now = Stillness(TIMEOUT_S, 0.0), 0.0
    while stillness.look(now, next(readings)) is None:
        now += look_s
        assert now < 3600, "it never stood still"
    return now


def always(*readings: Reading) -> Iterator[list[Reading]]:
    while True:
        yield list(readings)


def test_a_step_that_does_not_end_is_a_stall() -> None:
    assert seconds_until_stall(always(LEADER, FOLLOWER)) == pytest.approx(TIMEOUT_S, abs=1)


def test_who_beats_does_not_stand_still() -> None:
    stillness = Stillness(TIMEOUT_S, 0.0)
    for k in range(400):
        beating = replace(LEADER, beats=k // 40)  # every 20 s
        assert stillness.look(0.5 * k, [beating, FOLLOWER]) is None, "a follower without a batch does not count"


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.LOADING])
def test_what_cannot_beat_may_take_longer(phase: Phase) -> None:
    assert seconds_until_stall(always(replace(LEADER, phase=phase))) == pytest.approx(SLOW_TIMES * TIMEOUT_S, abs=1)
    assert seconds_until_stall(always()) == pytest.approx(SLOW_TIMES * TIMEOUT_S, abs=1), "no rank came up"


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.COMMITTING])
def test_reading_is_life_where_files_are_waited_for(phase: Phase) -> None:
    """Weights of hundreds of gigabytes, from a slow disk, to the devices or to their hash."""
    stillness = Stillness(TIMEOUT_S, 0.0)
    for k in range(2000):
        assert stillness.look(0.5 * k, [replace(LEADER, phase=phase, bytes_read=k << 18)]) is None
    assert seconds_until_stall(replace_bytes_read(Phase.STEPPING)) == pytest.approx(TIMEOUT_S, abs=1)


def replace_bytes_read(phase: Phase) -> Iterator[list[Reading]]:
    bytes_read = 0
    while True:
        bytes_read += 1 << 20
        yield [replace(LEADER, phase=phase, bytes_read=bytes_read)]


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """The node's process was stopped with all others, or the whole host slept."""
    stillness = Stillness(TIMEOUT_S, 0.0)
    assert [stillness.look(now, [LEADER]) for now in (0.5, 1.0, 5000.0, 5000.5)] == [None] * 4
    left = [now for now in (5000 + k / 2 for k in range(1, 100)) if stillness.look(now, [LEADER]) is not None]
    assert left[0] - 5000 == pytest.approx(TIMEOUT_S - 2, abs=1)


@pytest.mark.parametrize(
    ("states", "steps", "blamed"),
    [
        ({0: "S", 1: "S"}, (5, 5), [0]),  # rank 1 waits for a batch that does not come
        ({0: "S", 1: "T"}, (5, 5), [1]),
        ({0: "D", 1: "S"}, (5, 5), [0]),
        ({0: "R", 1: "R"}, (5, 3), [1]),
    ],
)
def test_the_culprit(states: dict[int, str], steps: tuple[int, int], blamed: list[int]) -> None:
    still = [Still(replace(reading, step=step), 31.0) for reading, step in zip((LEADER, FOLLOWER), steps, strict=True)]
    assert [s.reading.rank for s in culprits(still, states)] == blamed


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    both = [Still(LEADER, 31.0), Still(replace(FOLLOWER, phase=Phase.STEPPING), 31.0)]
    assert culprits(both, {}) == both


@pytest.fixture
def vitals() -> Iterator[Vitals]:
    vitals = Vitals.make()
    yield vitals
    vitals.remove()
    assert not vitals.folder.exists()


def start_rank(vitals: Vitals, mark: str, program: str, rank: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, FOLDER: str(vitals.folder), "RANK": str(rank), MARK: mark, "PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=env)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_stands_still_is_ended_with_its_stacks(vitals: Vitals, tmp_path: Path, stopped: bool) -> None:
    """In a loop in C, where no Python handler of signals would ever run."""
    mark = f"{tmp_path}:"
    rank = start_rank(vitals, mark, "from tests.job.hung import hang; hang()", 3)
    while not any(reading.step == 4 for reading in vitals.read()):
        time.sleep(0.02)
    if stopped:
        rank.send_signal(signal.SIGSTOP)
    watchdog = Watchdog(vitals, mark, timeout_s=1.0)
    watchdog.start()
    assert rank.wait(timeout=60) == -signal.SIGKILL
    watchdog.close()
    assert not marked(mark)
    assert watchdog.verdict is not None and re.match(r"stood still for \d s: rank 3 in step 4", watchdog.verdict)
    assert ("(stopped by a signal)" in watchdog.verdict) == stopped
    assert "hung.py" in watchdog.stacks[3] and watchdog.stacks[3].count("most recent call first") == 2


def test_a_rank_that_another_node_ends_is_asked_where_it_stands(vitals: Vitals, tmp_path: Path) -> None:
    mark = f"{tmp_path}:"
    rank = start_rank(vitals, mark, "from tests.job.hung import hang; hang()", 5)
    watchdog = Watchdog(vitals, mark, timeout_s=5.0)
    watchdog.start()
    while watchdog._stillness.longest_s < 2.5:
        assert rank.poll() is None
        time.sleep(0.05)
    watchdog.ask()
    assert rank.poll() is None and watchdog.verdict is None
    assert "hung.py" in watchdog.stacks[5]
    rank.kill()
    rank.wait()


def test_of_who_cannot_tell_the_kernel_does() -> None:
    assert f"  {os.getpid()} " in kernel_view(os.getpid())


def test_nobody_is_killed_who_moves(vitals: Vitals, tmp_path: Path) -> None:
    mark = f"{tmp_path}:"
    rank = start_rank(vitals, mark, "from tests.job.hung import move; move(seconds=3)", 0)
    watchdog = Watchdog(vitals, mark, timeout_s=2.0)
    watchdog.start()
    assert rank.wait(timeout=60) == 0
    watchdog.close()
    assert watchdog.verdict is None


@pytest.mark.parametrize("phase", Phase)
def test_each_phase_has_words(phase: Phase) -> None:
    still = Still(replace(LEADER, phase=phase), 31.4)
    assert verdict([still], {0: "D"}, {}).startswith("stood still for 31 s: rank 0 ")
    assert verdict([], {}, {}) == "no rank came up in time"


def test_where_somebody_stands() -> None:
    told = """
Thread 0x01 (most recent call first):
  File "/usr/lib/python3.11/posixpath.py", line 5 in join
  File "/x/batchinfer/publish.py", line 44 in publish
  File "/x/batchinfer/worker/sink.py", line 200 in _commit
  File "/usr/lib/python3.11/threading.py", line 980 in run

Current thread 0x02 (most recent call first):
  File "/x/torch/cuda.py", line 9 in synchronize
  File "/x/batchinfer/engine/engine.py", line 170 in step
  File "/x/batchinfer/worker/replica.py", line 180 in _turn
"""
    assert innermost(told) == "batchinfer/engine/engine.py:170 in step"
    assert innermost(told, "batchinfer/worker/sink.py") == "batchinfer/publish.py:44 in publish"
    assert innermost("nothing") is None


def test_folders_of_nodes_that_were_killed_are_cleared_away() -> None:
    program = (
        "from batchinfer.job.vitals import Vitals; print(Vitals.make().folder, flush=True); import os; os.kill(os.getpid(), 9)"
    )
    left = Path(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True).stdout.strip())
    assert left.exists()
    Vitals.make().remove()
    assert not left.exists()


def test_a_beat_costs_next_to_nothing() -> None:
    pulse, begin = Pulse(), time.process_time()
    for step in range(10_000):
        pulse.beat(Phase.STEPPING, step)
    assert (time.process_time() - begin) / 10_000 < 50e-6
