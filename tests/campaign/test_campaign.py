from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.campaign import Campaign, Report, plan
from tests.campaign.faults import BLOWS, KINDS


@pytest.fixture
def campaign(tmp_path: Path) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path)
    yield campaign
    campaign.site.close()


def test_every_fault_in_one_run(campaign: Campaign) -> None:
    campaign.round(seed=1)
    print("\n".join(campaign.report.lines()))
    assert campaign.report.is_good
    assert set(campaign.report.hits) | set(campaign.report.skipped) == set(KINDS)
    assert not (campaign.report.skipped and os.environ.get("CI") == "true"), "CI can mount what it needs"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 104))
def test_rounds_of_a_campaign(campaign: Campaign, seed: int) -> None:
    for number in range(4):
        campaign.round(10 * seed + number)
    print("\n".join(campaign.report.lines()))
    assert campaign.report.is_good


def test_a_report_tells_lost_doubled_and_different_rows_apart() -> None:
    report, expected = Report(), {("a", row, 0): (f"text {row}",) for row in range(4)}
    report.compare(expected, list(expected.items()))
    assert report.is_good
    (first, second, third, _) = expected.items()
    report.compare(expected, [first, first, (second[0], ("another text",)), third])
    assert (report.lost, report.doubled, report.different) == (1, 1, 1) and not report.is_good
    assert "8 rows: lost 1, doubled 1, different 1" in report.lines()


def test_a_plan_has_every_kind_once_and_one_blow_a_job() -> None:
    for seed in range(20):
        jobs = list(plan(list(KINDS), random.Random(seed)))
        assert sorted([*(blow for blow, _ in jobs if blow), *(kind for _, others in jobs for kind in others)]) == sorted(KINDS)
        assert len(jobs) == len(BLOWS)
    assert list(plan([], random.Random(0))) == [(None, [])]
