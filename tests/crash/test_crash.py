from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# At least so many calls are behind each scenario: fewer would mean that the driver no longer sees them.
LEAST_KILLS = {
    "claim_and_commit": 50,
    "without_links": 50,
    "success_reported_as_failure": 55,
    "claim_and_release": 45,
    "take_over": 55,
    "retry_errors": 60,
    "export_shards": 20,
    "create_manifest": 90,
    "small_files": 28,
}

NAMES = (3000, 3)  # that a claim may list: as in a small run, and as in a large one


def run_script(name: str, *arguments: object) -> dict[str, int]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    happened: dict[str, int] = json.loads(result.stdout)
    print(name, *arguments, happened)
    return happened


@pytest.mark.parametrize("scenario", LEAST_KILLS)
def test_killed_before_every_call(tmp_path: Path, scenario: str) -> None:
    assert run_script("driver.py", scenario, tmp_path)["kills"] >= LEAST_KILLS[scenario]


@pytest.mark.parametrize("names", NAMES)
def test_workers_racing_under_random_kills(tmp_path: Path, names: int) -> None:
    happened = run_script("race.py", tmp_path, 1, 150, names)
    assert happened["kills"] and happened["freezes"] and happened["later_claims"]


@pytest.mark.slow
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("seed", range(2, 22))
def test_workers_racing_under_random_kills_for_long(tmp_path: Path, seed: int, names: int) -> None:
    happened = run_script("race.py", tmp_path, seed, 300, names)
    assert happened["kills"] and happened["freezes"] and happened["later_claims"]
