"""What a stopped replica leaves of its rows: read back as it was, and never when it is damaged, stale or of something else."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.data.partials import Key, load_partial, prompt_hash, save_partial
from batchinfer.data.results import Logprobs, RowResult
from batchinfer.engine.sequence import TokenLogprobs
from batchinfer.job.rundir import RunDir

FINGERPRINT = "f00d"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    return run_dir


def logprobs(count: int) -> Logprobs:
    told = Logprobs()
    told.extend([None])
    told.extend(TokenLogprobs(k, -k / 3, k, [(i, -i / 7) for i in range(k % 3)]) for k in range(1, count))
    return told


def begun(tokens: int = 3) -> dict[Key, RowResult]:
    goes_on = RowResult(4, None, list(range(tokens)), ttft_s=0.25, latency_s=1.5, prompt_hash=-7, logprobs=logprobs(tokens))
    goes_on.prompt_logprobs = logprobs(4)
    ended = RowResult(5, "text", [1, 2], "stop", sample=1, ttft_s=0.5, latency_s=2.5, step_first=3, step_last=9, prompt_hash=8)
    ended.replica = "01-0-0"
    return {("a.parquet", 7, 0): goes_on, ("b/c.parquet", 2**40, 1): ended}


def plain(results: dict[Key, RowResult]) -> dict[Key, dict[str, object]]:
    """As values that compare."""
    found: dict[Key, dict[str, object]] = {}
    for key, result in results.items():
        values = {name: getattr(result, name) for name in RowResult.__dataclass_fields__}
        for name in ("logprobs", "prompt_logprobs"):
            told = values[name]
            values[name] = told and [list(getattr(told, part)) for part in Logprobs.__slots__]
        found[key] = values
    return found


def test_it_is_read_back_as_it_was(run_dir: RunDir) -> None:
    save_partial(run_dir, 3, 0, FINGERPRINT, begun())
    assert plain(load_partial(run_dir, 3, 2, FINGERPRINT)) == plain(begun())
    first, second = load_partial(run_dir, 3, 2, FINGERPRINT).values()
    assert not first.ended and second.ended
    copy.copy(first).token_ids.append(5)  # a list that can grow
    assert first.logprobs is not None
    first.logprobs.extend([TokenLogprobs(1, -1.0, 1, [])])


def test_the_newest_of_an_older_claim_counts(run_dir: RunDir) -> None:
    for epoch, tokens in ((0, 2), (10, 4), (9, 3), (12, 5)):
        save_partial(run_dir, 3, epoch, FINGERPRINT, begun(tokens))
    save_partial(run_dir, 33, 11, FINGERPRINT, begun(6))

    def tokens_for(epoch: int) -> list[int]:
        return [len(result.token_ids) for result in load_partial(run_dir, 3, epoch, FINGERPRINT).values()][:1]

    assert [tokens_for(epoch) for epoch in (0, 1, 9, 10, 11, 12, 13)] == [[], [2], [2], [3], [4], [4], [5]]


def test_another_request_is_never_gone_on_with(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    save_partial(run_dir, 3, 0, FINGERPRINT, begun())
    os.rename(run_dir.partial(3, 0), run_dir.partial(4, 0))
    save_partial(run_dir, 3, 0, "beef", begun())
    with caplog.at_level(logging.WARNING):
        assert load_partial(run_dir, 3, 1, FINGERPRINT) == load_partial(run_dir, 4, 1, FINGERPRINT) == {}
    assert caplog.text.count("it is of another request") == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "no footer", "flipped", "folder"])
def test_a_damaged_one_is_left_aside_for_the_one_before(run_dir: RunDir, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    save_partial(run_dir, 3, 0, FINGERPRINT, begun(2))
    save_partial(run_dir, 3, 2, FINGERPRINT, begun(4))
    path = run_dir.partial(3, 2)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no footer":
        path.write_bytes(data.replace(b"batchinfer", b"batchinfOr"))
    elif damage == "flipped":  # a value in the footer that Parquet does not check
        path.write_bytes(data.replace(b'content_hash": "', b'content_hash": "0', 1))
    else:
        path.unlink()
        path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert plain(load_partial(run_dir, 3, 4, FINGERPRINT)) == plain(begun(2))
    assert str(path) in caplog.text and "made again" in caplog.text


def test_they_go_with_their_unit(run_dir: RunDir) -> None:
    for unit, epoch in ((3, 0), (3, 2), (30, 0)):
        save_partial(run_dir, unit, epoch, FINGERPRINT, begun())
    run_dir.remove_partials(3)
    assert os.listdir(run_dir.partials) == ["000030.0.parquet"]


def test_the_same_claim_may_save_again(run_dir: RunDir) -> None:
    for tokens in (2, 4):
        save_partial(run_dir, 3, 1, FINGERPRINT, begun(tokens))
    assert plain(load_partial(run_dir, 3, 2, FINGERPRINT)) == plain(begun(4))


def test_prompts_are_told_apart() -> None:
    assert prompt_hash([1, 2]) == prompt_hash((1, 2)) != prompt_hash([2, 1]) and -(2**63) <= prompt_hash([5]) < 2**63


KILLED = """
import os, signal, sys
from pathlib import Path
from batchinfer.job.rundir import RunDir
from batchinfer.data.partials import save_partial
from tests.data.test_partials import FINGERPRINT, begun
setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
save_partial(RunDir(Path(sys.argv[1])), 3, 2, FINGERPRINT, begun(4))
"""


@pytest.mark.parametrize(("call", "tokens"), [("fsync", 2), ("replace", 2)])
def test_killed_while_it_saves_the_one_before_stands(run_dir: RunDir, call: str, tokens: int) -> None:
    save_partial(run_dir, 3, 0, FINGERPRINT, begun(2))
    died = subprocess.run([sys.executable, "-c", KILLED, str(run_dir.root), call], cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    assert plain(load_partial(run_dir, 3, 4, FINGERPRINT)) == plain(begun(tokens))
    assert run_dir.clean_temporaries() == 1
