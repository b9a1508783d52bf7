from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchinfer.job.claims import ClaimBoard, Identity
from batchinfer.job.rundir import RunDir
from batchinfer.publish import replace_bytes

TIMEOUT_S = 60.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(run_dir: RunDir, clock: Clock) -> Callable[..., ClaimBoard]:
    def make(replica: str, num_units: int = 3, goals: dict[int, int] | None = None, **changes: object) -> ClaimBoard:
        identity = dataclasses.replace(Identity.here(replica), **changes)  # type: ignore[arg-type]
        return ClaimBoard(run_dir, num_units, identity, TIMEOUT_S, clock, goals)

    return make


def beat(run_dir: RunDir, replica: str, count: int) -> None:
    run_dir.replica(replica).mkdir(exist_ok=True)
    replace_bytes(run_dir.progress(replica), json.dumps({"beat": count}).encode())


def commit(run_dir: RunDir, unit: int, generation: int = 0) -> None:
    run_dir.completion(unit, generation).touch()


def test_units_are_handed_out_once_lowest_first(board: Callable[..., ClaimBoard]) -> None:
    a, b = board("a"), board("b")
    assert [a.claim(), b.claim(), a.claim(), b.claim(), a.claim()] == [0, 1, 2, None, None]
    assert a.held() == [0, 2] and b.held() == [1]


def test_a_rush_gives_every_unit_to_one_replica(board: Callable[..., ClaimBoard]) -> None:
    boards = [board(f"r{i}", num_units=40) for i in range(8)]

    def take_all(b: ClaimBoard) -> list[int]:
        return list(iter(b.claim, None))

    with ThreadPoolExecutor(8) as pool:
        taken = [unit for units in pool.map(take_all, boards) for unit in units]
    assert sorted(taken) == list(range(40))


def test_done_units_are_never_claimed(run_dir: RunDir, board: Callable[..., ClaimBoard]) -> None:
    a, b = board("a"), board("b")
    commit(run_dir, 0)
    assert a.claim() == 1 and a.pending() == [1, 2] and not a.finished()
    commit(run_dir, 1)
    commit(run_dir, 2, generation=3)
    assert a.held() == [] and b.claim() is None
    assert a.finished() and b.finished() and board("c").finished()


def test_a_retry_takes_up_where_the_generation_before_ended(run_dir: RunDir, board: Callable[..., ClaimBoard]) -> None:
    """At once, also when who had made that lives on another host."""
    first = board("first", host="elsewhere")
    assert [first.claim() for _ in range(3)] == [0, 1, 2]
    for unit in range(3):
        commit(run_dir, unit)
    a, b = (board(name, goals={0: 1, 2: 1}) for name in "ab")
    assert a.pending() == [0, 2]
    assert [a.claim(), b.claim(), a.claim(), b.claim()] == [0, 2, None, None]
    assert a.holds(0) and run_dir.claim(0, 1).exists() and not run_dir.claim(1, 1).exists()
    commit(run_dir, 2, generation=1)
    assert b.held() == [] and a.pending() == b.pending() == [0]
    a.release(0)
    assert b.claim() == 0
    commit(run_dir, 0, generation=1)
    assert a.finished() and b.finished() and first.finished()
    third = board("third", goals={0: 2, 2: 1})
    assert third.pending() == [0] and third.claim() == 0


def test_a_lost_holder_in_a_retry_is_found_as_ever(run_dir: RunDir, board: Callable[..., ClaimBoard], clock: Clock) -> None:
    board("first", num_units=1).claim()
    commit(run_dir, 0)
    a, b = board("a", num_units=1, goals={0: 1}, host="elsewhere"), board("b", num_units=1, goals={0: 1})
    assert [a.claim(), b.claim()] == [0, None]
    clock.now += TIMEOUT_S
    assert b.claim() == 0 and not a.holds(0)


def test_a_foreign_number_does_not_finish_the_run(run_dir: RunDir, board: Callable[..., ClaimBoard]) -> None:
    for unit in (0, 1, 7):
        commit(run_dir, unit)
    assert board("a").pending() == [2]


def test_a_released_unit_is_free_again(run_dir: RunDir, board: Callable[..., ClaimBoard]) -> None:
    a, b = board("a"), board("b")
    assert [a.claim(), b.claim()] == [0, 1]
    a.release(0)
    a.release(0)  # no longer ours: nothing happens
    assert not a.holds(0) and b.claim() == 0 and a.claim() == 2
    assert sorted(os.listdir(run_dir.claims)) == [run_dir.claim(*c).name for c in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))]


def test_a_dead_process_of_this_host_loses_its_claim_at_once(board: Callable[..., ClaimBoard]) -> None:
    a, b = board("a", num_units=1, pid=2**22 + 1), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, 0]
    assert b.holds(0) and not a.holds(0)
    a.release(0)
    assert b.holds(0), "what was taken over is not given back by the one who lost it"


def test_the_start_time_guards_against_reused_pids(board: Callable[..., ClaimBoard]) -> None:
    a, b = board("a", num_units=1, started=1), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, 0]


@pytest.mark.parametrize("elsewhere", ["host", "boot", "pid_namespace"])
def test_processes_elsewhere_are_not_judged_by_their_pid(board: Callable[..., ClaimBoard], elsewhere: str) -> None:
    a, b = board("a", num_units=1, pid=2**22 + 1, **{elsewhere: "other"}), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, None]


def test_a_zombie_is_dead_and_odd_names_do_not_confuse() -> None:
    script = "import os; open('/proc/self/comm', 'w').write('a) S 1 (b'); print(flush=True); input(); os._exit(0)"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    child.stdout.readline()
    me = Identity.here("me")
    stat = Path(f"/proc/{child.pid}/stat").read_text()
    identity = dataclasses.replace(me, pid=child.pid, started=int(stat.rsplit(") ", 1)[1].split()[19]))
    assert not identity.is_dead_beside(me)
    child.stdin.write(b"\n")
    child.stdin.flush()
    deadline = time.monotonic() + 10
    while not identity.is_dead_beside(me):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert " Z " in Path(f"/proc/{child.pid}/stat").read_text(), "nobody has waited for it: still a zombie"
    child.communicate()
    assert identity.is_dead_beside(me) and not me.is_dead_beside(me)


def test_a_silent_holder_elsewhere_is_lost_after_the_timeout(
    run_dir: RunDir, board: Callable[..., ClaimBoard], clock: Clock
) -> None:
    a, b = board("a", num_units=1, host="other"), board("b", num_units=1)
    beat(run_dir, "a", 5)
    assert [a.claim(), b.claim()] == [0, None]
    clock.now += TIMEOUT_S - 1
    assert b.claim() is None
    beat(run_dir, "a", 6)
    clock.now += 2
    assert b.claim() is None, "it has moved since"
    clock.now += TIMEOUT_S
    assert b.claim() == 0


def test_a_holder_without_a_heartbeat_counts_from_the_first_look(board: Callable[..., ClaimBoard], clock: Clock) -> None:
    clock.now = 1e6
    a, b = board("a", num_units=1, host="other"), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, None]
    clock.now += TIMEOUT_S
    assert b.claim() == 0


def test_only_the_observers_clock_counts(run_dir: RunDir, board: Callable[..., ClaimBoard], clock: Clock) -> None:
    a, b = board("a", num_units=1, host="other"), board("b", num_units=1)
    assert a.claim() == 0
    beat(run_dir, "a", 1)
    for path in (run_dir.progress("a"), run_dir.claim(0, 0)):
        os.utime(path, (0, 0))  # a file server whose clock is decades behind
    assert b.claim() is None


def test_free_units_come_before_lost_ones(board: Callable[..., ClaimBoard]) -> None:
    a, b = board("a", pid=2**22 + 1), board("b")
    assert a.claim() == 0
    assert [b.claim(), b.claim(), b.claim()] == [1, 2, 0]


def test_only_one_takes_over(board: Callable[..., ClaimBoard]) -> None:
    dead = board("dead", num_units=1, pid=2**22 + 1)
    assert dead.claim() == 0
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda i: board(f"r{i}", num_units=1).claim(), range(8)))
    assert taken.count(0) == 1 and taken.count(None) == 7


def test_own_claims_are_not_claimed_again(board: Callable[..., ClaimBoard], clock: Clock) -> None:
    a = board("a", num_units=1)
    assert a.claim() == 0
    clock.now += 10 * TIMEOUT_S
    assert a.claim() is None and a.holds(0)


def test_a_unit_that_comes_back_while_in_work_is_renewed_not_begun_anew(
    run_dir: RunDir, board: Callable[..., ClaimBoard], clock: Clock
) -> None:
    a, b = board("a", num_units=1, host="other"), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, None]
    clock.now += TIMEOUT_S
    assert b.claim() == 0 and not a.holds(0)
    b.release(0)
    beat(run_dir, "a", 1)
    assert a.claim() is None and a.holds(0) and b.claim() is None


def test_a_former_life_of_a_replica_is_lost(run_dir: RunDir, board: Callable[..., ClaimBoard]) -> None:
    before, now = board("a", num_units=1, host="other"), board("a", num_units=1)
    beat(run_dir, "a", 1)
    assert [before.claim(), now.claim()] == [0, 0]


def test_a_commit_after_our_listing_is_seen_before_a_takeover(
    run_dir: RunDir, board: Callable[..., ClaimBoard], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, b = board("dead", num_units=1, pid=2**22 + 1), board("b", num_units=1)
    assert dead.claim() == 0
    listing = run_dir.done_units()
    commit(run_dir, 0)
    monkeypatch.setattr(RunDir, "done_units", lambda self: listing)
    assert b.claim() is None


def test_a_claim_lists_each_folder_once_and_reads_no_first_claims(
    run_dir: RunDir, board: Callable[..., ClaimBoard], monkeypatch: pytest.MonkeyPatch
) -> None:
    others, mine = board("others", num_units=50, host="other"), board("mine", num_units=50)
    for _ in range(49):
        others.claim()
    listed, read = [], []
    real_list, real_read = os.listdir, Path.read_bytes
    monkeypatch.setattr(os, "listdir", lambda path: (listed.append(Path(path).name), real_list(path))[1])
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real_read(path))[1])
    assert mine.claim() == 49
    assert sorted(listed) == ["claims", "completions"] and not any(name.endswith(".json") for name in read)
    assert mine.claim() is None and mine.claim() is None
    assert sorted(name for name in read if name[0] == "0") == [f"{unit:06d}.0.json" for unit in range(49)], "each once"
