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

from batchinfer.job import claims
from batchinfer.job.claims import ClaimBoard, Identity
from batchinfer.job.rundir import RunDir
from batchinfer.publish import replace_bytes

TIMEOUT_S = 60.0
Make = Callable[..., ClaimBoard]
in_a_small_run = pytest.mark.parametrize("board", ["every call lists"], indirect=True)


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


@pytest.fixture(params=["every call lists", "names are asked for"])
def board(run_dir: RunDir, clock: Clock, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes boards, of a small run or as if the run were large: no call after the first lists by itself."""
    if request.param == "names are asked for":
        monkeypatch.setattr(claims, "NAMES_PER_CLAIM", 1e-9)

    def make(replica: str, num_units: int = 3, goals: dict[int, int] | None = None, **changes: object) -> ClaimBoard:
        identity = dataclasses.replace(Identity.here(replica), **changes)  # type: ignore[arg-type]
        return ClaimBoard(run_dir, num_units, identity, TIMEOUT_S, clock, goals)

    return make


def beat(run_dir: RunDir, replica: str, count: int) -> None:
    run_dir.replica(replica).mkdir(exist_ok=True)
    replace_bytes(run_dir.progress(replica), json.dumps({"beat": count}).encode())


def commit(run_dir: RunDir, unit: int, generation: int = 0) -> None:
    run_dir.completion(unit, generation).touch()


def test_units_are_handed_out_once_lowest_first(board: Make) -> None:
    a, b = board("a"), board("b")
    assert [a.claim(), b.claim(), a.claim(), b.claim(), a.claim()] == [0, 1, 2, None, None]
    assert a.held() == [0, 2] and b.held() == [1]


def test_a_rush_gives_every_unit_to_one_replica(board: Make) -> None:
    boards = [board(f"r{i}", num_units=40) for i in range(8)]

    def take_all(b: ClaimBoard) -> list[int]:
        return list(iter(b.claim, None))

    with ThreadPoolExecutor(8) as pool:
        taken = [unit for units in pool.map(take_all, boards) for unit in units]
    assert sorted(taken) == list(range(40))


@in_a_small_run
def test_done_units_are_never_claimed(run_dir: RunDir, board: Make) -> None:
    a, b = board("a"), board("b")
    commit(run_dir, 0)
    assert a.claim() == 1 and a.pending() == [1, 2] and not a.finished()
    commit(run_dir, 1)
    commit(run_dir, 2, generation=3)
    assert a.held() == []
    for each in (a, b, board("c")):
        assert not each.finished() and each.claim() is None and each.finished()


def test_a_retry_takes_up_where_the_generation_before_ended(run_dir: RunDir, board: Make) -> None:
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
    for each in (a, b, first):
        assert each.claim() is None and each.finished()
    third = board("third", goals={0: 2, 2: 1})
    assert third.pending() == [0] and third.claim() == 0


def test_a_lost_holder_in_a_retry_is_found_as_ever(run_dir: RunDir, board: Make, clock: Clock) -> None:
    board("first", num_units=1).claim()
    commit(run_dir, 0)
    a, b = board("a", num_units=1, goals={0: 1}, host="elsewhere"), board("b", num_units=1, goals={0: 1})
    assert [a.claim(), b.claim()] == [0, None]
    clock.now += TIMEOUT_S
    assert b.claim() == 0 and not a.holds(0)


def test_a_foreign_number_does_not_finish_the_run(run_dir: RunDir, board: Make) -> None:
    for unit in (0, 1, 7):
        commit(run_dir, unit)
    assert board("a").pending() == [2]


@in_a_small_run
def test_a_released_unit_is_free_again(run_dir: RunDir, board: Make) -> None:
    a, b = board("a"), board("b")
    assert [a.claim(), b.claim()] == [0, 1]
    a.release(0)
    a.release(0)  # no longer ours: nothing happens
    assert not a.holds(0) and b.claim() == 0 and a.claim() == 2
    assert sorted(os.listdir(run_dir.claims)) == [run_dir.claim(*c).name for c in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))]


def test_a_dead_process_of_this_host_loses_its_claim_at_once(board: Make) -> None:
    a, b = board("a", num_units=1, pid=2**22 + 1), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, 0]
    assert b.holds(0) and not a.holds(0)
    a.release(0)
    assert b.holds(0), "what was taken over is not given back by the one who lost it"


def test_the_start_time_guards_against_reused_pids(board: Make) -> None:
    a, b = board("a", num_units=1, started=1), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, 0]


@pytest.mark.parametrize("elsewhere", ["host", "boot", "pid_namespace"])
def test_processes_elsewhere_are_not_judged_by_their_pid(board: Make, elsewhere: str) -> None:
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


def test_a_silent_holder_elsewhere_is_lost_after_the_timeout(run_dir: RunDir, board: Make, clock: Clock) -> None:
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


def test_a_holder_without_a_heartbeat_counts_from_the_first_look(board: Make, clock: Clock) -> None:
    clock.now = 1e6
    a, b = board("a", num_units=1, host="other"), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, None]
    clock.now += TIMEOUT_S
    assert b.claim() == 0


def test_only_the_observers_clock_counts(run_dir: RunDir, board: Make, clock: Clock) -> None:
    a, b = board("a", num_units=1, host="other"), board("b", num_units=1)
    assert a.claim() == 0
    beat(run_dir, "a", 1)
    for path in (run_dir.progress("a"), run_dir.claim(0, 0)):
        os.utime(path, (0, 0))  # a file server whose clock is decades behind
    assert b.claim() is None


def test_free_units_come_before_lost_ones(board: Make) -> None:
    a, b = board("a", pid=2**22 + 1), board("b")
    assert a.claim() == 0
    assert [b.claim(), b.claim(), b.claim()] == [1, 2, 0]


def test_only_one_takes_over(board: Make) -> None:
    dead = board("dead", num_units=1, pid=2**22 + 1)
    assert dead.claim() == 0
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda i: board(f"r{i}", num_units=1).claim(), range(8)))
    assert taken.count(0) == 1 and taken.count(None) == 7


def test_own_claims_are_not_claimed_again(board: Make, clock: Clock) -> None:
    a = board("a", num_units=1)
    assert a.claim() == 0
    clock.now += 10 * TIMEOUT_S
    assert a.claim() is None and a.holds(0)


def test_a_unit_that_comes_back_while_in_work_is_renewed_not_begun_anew(run_dir: RunDir, board: Make, clock: Clock) -> None:
    a, b = board("a", num_units=1, host="other"), board("b", num_units=1)
    assert [a.claim(), b.claim()] == [0, None]
    clock.now += TIMEOUT_S
    assert b.claim() == 0 and not a.holds(0)
    b.release(0)
    beat(run_dir, "a", 1)
    assert a.claim() is None and a.holds(0) and b.claim() is None


def test_a_former_life_of_a_replica_is_lost(run_dir: RunDir, board: Make) -> None:
    before, now = board("a", num_units=1, host="other"), board("a", num_units=1)
    beat(run_dir, "a", 1)
    assert [before.claim(), now.claim()] == [0, 0]


def test_a_commit_after_our_listing_is_seen_before_a_takeover(
    run_dir: RunDir, board: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, b = board("dead", num_units=1, pid=2**22 + 1), board("b", num_units=1)
    assert dead.claim() == 0
    listing = run_dir.done_units()
    commit(run_dir, 0)
    monkeypatch.setattr(RunDir, "done_units", lambda self: listing)
    assert b.claim() is None


@in_a_small_run
def test_a_claim_lists_each_folder_once_and_reads_no_first_claims(
    run_dir: RunDir, board: Make, monkeypatch: pytest.MonkeyPatch
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


class Calls:
    """Names asked for and listed since the last look at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked = self.listed = 0
        real_list, real_stat = os.listdir, os.stat

        def listdir(path: Path) -> list[str]:
            names = real_list(path)
            self.listed += len(names)
            return names

        def stat(path: Path, **kwargs: bool) -> os.stat_result:
            self.asked += 1
            return real_stat(path, **kwargs)

        monkeypatch.setattr(os, "listdir", listdir)
        monkeypatch.setattr(os, "stat", stat)

    def since(self) -> tuple[int, int]:
        asked, self.asked, listed, self.listed = self.asked, 0, self.listed, 0
        return asked, listed


UNITS = 20_000
as_in_a_large_run = pytest.mark.parametrize("board", ["names are asked for"], indirect=True)


def claimed_by_others(run_dir: RunDir, units: range, holder: ClaimBoard) -> None:
    """Their claims, without their cost."""
    assert holder.claim() == units[0]
    for unit in units[1:]:
        os.link(run_dir.claim(units[0], 0), run_dir.claim(unit, 0))


@as_in_a_large_run
def test_what_a_claim_costs_does_not_grow_with_the_run(run_dir: RunDir, board: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed_by_others(run_dir, range(UNITS // 2), board("others", UNITS, host="other"))
    mine, calls = board("mine", UNITS), Calls(monkeypatch)
    assert mine.claim() == UNITS // 2 and calls.since()[1] == UNITS // 2
    assert mine.claim() == UNITS // 2 + 1 and calls.since() == (1, 0), "the first one asked for is free"
    for taken in (1, 10, 1000):
        first = max(mine.held()) + 1
        claimed_by_others(run_dir, range(first, first + taken), board(f"others{taken}", UNITS, host="other"))
        calls.since()
        assert mine.claim() == first + taken
        assert calls.since()[0] <= 3 + 2 * taken.bit_length()
    assert calls.listed == 0


def test_a_large_run_is_listed_now_and_then(run_dir: RunDir, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a unit that was given back is found, long before the last one, for `NAMES_PER_CLAIM` names a call."""
    units = 4 * claims.NAMES_PER_CLAIM
    a, b = (ClaimBoard(run_dir, units, Identity.here(name), TIMEOUT_S, clock) for name in "ab")
    claimed_by_others(run_dir, range(units - 100), a)
    calls = Calls(monkeypatch)
    assert b.claim() == units - 100
    a.release(0)
    claimed = [b.claim() for _ in range(60)]
    assert 0 in claimed[:6] and claimed[7:] == sorted(claimed[7:])
    assert calls.since()[1] == pytest.approx(60 * claims.NAMES_PER_CLAIM, rel=0.2)


@as_in_a_large_run
def test_who_has_nothing_to_do_looks_at_some_units_and_lists_when_most_are_done(
    run_dir: RunDir, board: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    others, mine = board("others", 200, host="other"), board("mine", 200)
    claimed_by_others(run_dir, range(200), others)
    assert mine.claim() is None
    calls = Calls(monkeypatch)
    others.release(0)
    looks = 200 // claims.LOOKS + 1
    assert 0 in [mine.claim() for _ in range(looks)], "all were looked at in turn"
    asked, listed = calls.since()
    assert asked <= looks * (2 * claims.LOOKS + 3) and listed == 0
    for unit in range(199):
        commit(run_dir, unit)
    assert mine.claim() is None and calls.since()[1] > 0 and not mine.finished()
    commit(run_dir, 199)
    assert mine.claim() is None and calls.since() == (1, 0) and mine.finished()
