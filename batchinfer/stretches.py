"""When a run was worked on: stretches without the pauses between submissions, and how long their ends drag on.

The tail of a stretch goes from the first replica that had nothing to run and found nothing to claim any more to the end of the
last commit. Only replicas that committed something count, and none that was stopped or died: those were not idle. Times are
seconds since the Unix epoch, by each replica's own clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Span = tuple[float, float]  # a replica's first step's start and last step's end


@dataclass(frozen=True)
class Ending:
    """`idle_since`: from then on it had no work; None: it had, or did not come to that end."""

    idle_since: float | None
    last_commit: float | None


def stretches(spans: Mapping[str, Span]) -> list[list[str]]:
    """The replicas, parted where the run stood still between submissions. Submissions that overlap are one stretch."""
    submissions: dict[str, list[str]] = defaultdict(list)
    for replica in spans:
        submissions[_submission(replica)].append(replica)
    found: list[list[str]] = []
    for group in sorted(submissions.values(), key=lambda names: _start(names, spans)):
        if found and _start(group, spans) <= _end(found[-1], spans):
            found[-1] += group
        else:
            found.append(group)
    return found


def wall(spans: Mapping[str, Span]) -> float:
    """Seconds from first step to last, without pauses."""
    return float(sum(_end(names, spans) - _start(names, spans) for names in stretches(spans)))


def tails(spans: Mapping[str, Span], endings: Mapping[str, Ending]) -> dict[str, float | None]:
    """Seconds, by the submissions of each stretch, in order. None: no replica found that nothing was left."""
    found = {}
    for names in stretches(spans):
        worked = [ending for name in names if (ending := endings.get(name)) and ending.last_commit is not None]
        found["+".join(sorted({_submission(name) for name in names}))] = _tail(worked)
    return found


def _tail(worked: Sequence[Ending]) -> float | None:
    idle = [ending.idle_since for ending in worked if ending.idle_since is not None]
    if not idle:
        return None
    return max(0.0, max(ending.last_commit for ending in worked if ending.last_commit is not None) - min(idle))


def _submission(replica: str) -> str:
    return replica.split("-")[0]


def _start(names: Sequence[str], spans: Mapping[str, Span]) -> float:
    return min(spans[name][0] for name in names)


def _end(names: Sequence[str], spans: Mapping[str, Span]) -> float:
    return max(spans[name][1] for name in names)
