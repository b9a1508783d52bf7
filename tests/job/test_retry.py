"""What a retry freezes, who may join it, and what is left of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.config import ConfigError
from batchinfer.job import retry
from batchinfer.job.retry import Goal, begin, describe, errors_in, goals, is_complete, unfinished
from batchinfer.job.rundir import RunDir
from tests.job.runs import commit, commit_all, create


@pytest.fixture
def done(tmp_path: Path) -> RunDir:
    """Four units, in each of which the first row is an error (null_prompt)."""
    return commit_all(create(tmp_path, {}))


EVERY = {unit: Goal(1, (), 1) for unit in range(4)}


def test_goals_are_frozen_once_and_reached_unit_by_unit(done: RunDir) -> None:
    assert goals(done) == {} and is_complete(done)
    assert begin(done, []) == EVERY == goals(done) == unfinished(done)
    assert not is_complete(done)
    commit(done, 2, generation=1)
    left = {unit: goal for unit, goal in EVERY.items() if unit != 2}
    assert unfinished(done) == left
    assert begin(done, []) == left, "it is taken up, not begun anew"
    assert [path.name for path in done.retries.iterdir()] == ["01.json"]
    for unit in left:
        commit(done, unit, generation=1)
    assert is_complete(done) and errors_in(done, EVERY) == 4
    again = {unit: Goal(2, ("null_prompt",), 1) for unit in range(4)}
    assert begin(done, ["null_prompt"]) == again == goals(done)
    assert [path.name for path in sorted(done.retries.iterdir())] == ["01.json", "02.json"]


def test_a_unit_that_no_later_retry_names_keeps_its_goal(done: RunDir) -> None:
    """So that a file which was damaged and removed comes back as what it was."""
    begin(done, [])
    for unit in range(4):
        commit(done, unit, generation=1)
    (done.retries / "02.json").write_text(json.dumps({"codes": ["bad_logits"], "units": [[3, 2, 1]]}))
    assert goals(done) == EVERY | {3: Goal(2, ("bad_logits",), 1)}


def test_refusals(done: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"retry.codes=\[nul_prompt\]: no error code 'nul_prompt'; did you mean null_prompt\?"):
        begin(done, ["nul_prompt"])
    assert begin(done, ["bad_logits", "template_error"]) == {}
    assert not done.retries.exists()
    begin(done, ["null_prompt"])
    with pytest.raises(ConfigError, match=r"an earlier retry, retry.codes=\[null_prompt\], is not finished; finish it with: "):
        begin(done, ["bad_logits"])
    assert begin(done, ["null_prompt"]) == begin(done, []) == goals(done)
    done.completion(1, 0).unlink()
    with pytest.raises(ConfigError, match="rows are missing; finish them first: python -m batchinfer resume"):
        begin(done, [])


def test_of_two_that_freeze_at_once_the_first_counts(done: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    real = retry._wanted

    def overtaken(run_dir: RunDir, codes: list[str]) -> dict[int, Goal]:
        wanted = real(run_dir, codes)
        monkeypatch.setattr(retry, "_wanted", real)
        assert begin(run_dir, []) == EVERY
        commit(run_dir, 0, generation=1)
        return wanted

    monkeypatch.setattr(retry, "_wanted", overtaken)
    assert begin(done, []) == {unit: EVERY[unit] for unit in (1, 2, 3)}
    assert [path.name for path in done.retries.iterdir()] == ["01.json"]


def test_what_is_said_of_it(done: RunDir) -> None:
    assert describe(done, {}).endswith("no such error row, so nothing is run again")
    assert describe(done, begin(done, [])) == (
        "retry: 4 error rows (null_prompt 4) in 4 units; null_prompt: for such rows the same comes out again, unless the program "
        "has changed"
    )
