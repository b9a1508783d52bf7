from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.py")

# At least so many calls are behind each scenario: fewer would mean that the driver no longer sees them.
LEAST_KILLS = {
    "claim_and_commit": 55,
    "without_links": 55,
    "success_reported_as_failure": 55,
    "claim_and_release": 45,
    "take_over": 55,
    "second_generation": 25,
    "create_manifest": 90,
    "small_files": 28,
}


@pytest.mark.parametrize("scenario", LEAST_KILLS)
def test_killed_before_every_call(tmp_path: Path, scenario: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DRIVER), scenario, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    kills = json.loads(result.stdout)["kills"]
    print(f"{scenario}: {kills} kills")
    assert kills >= LEAST_KILLS[scenario]
