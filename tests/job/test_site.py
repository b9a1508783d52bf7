"""Limits as scontrol writes them; tests/slurm asks a real one."""

from __future__ import annotations

import pytest

from batchinfer.job.site import max_array_size, max_minutes

PARTITIONS = [
    "PartitionName=gpu AllowGroups=ALL Default=YES QoS=N/A MaxNodes=UNLIMITED MaxTime=2-00:30:00 MinNodes=0 State=UP",
    "PartitionName=debug AllowGroups=ALL Default=NO QoS=N/A MaxTime=00:30:00 TRES=cpu=64,mem=250G",
    "PartitionName=free AllowGroups=ALL Default=NO QoS=N/A MaxTime=UNLIMITED State=UP",
]


@pytest.mark.parametrize(
    ("wanted", "minutes"),
    [(None, 2910), (["debug"], 30), (["debug", "gpu"], 2910), (["free"], None), (["debug", "free"], None), (["nope"], None)],
)
def test_longest_time(wanted: list[str] | None, minutes: int | None) -> None:
    assert max_minutes(PARTITIONS, wanted) == minutes


def test_array_size() -> None:
    assert max_array_size("LogTimeFormat           = iso8601_ms\nMaxArraySize            = 1001\nMaxDBDMsgs = 20\n") == 1001
    assert max_array_size("") is None
