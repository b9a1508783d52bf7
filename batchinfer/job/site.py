"""What a SLURM site allows, asked of scontrol: so that a request beyond it is refused in a sentence before it is submitted.

sbatch itself says little about an array that is too long, and takes a time limit beyond the partition's without a word: such a
job waits for ever. Where scontrol does not answer nothing is known, and sbatch has the last word.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable

from batchinfer.config import Config, ConfigError, show

DURATION = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)")


def check_limits(config: Config) -> None:
    """Raises ConfigError for more jobs than an array holds, and for more minutes than the partition grants."""
    launcher, span = config.launcher, config.hw.nodes_per_replica
    longest = max_array_size(_scontrol("config"))
    if longest is not None and launcher.nodes // span > longest:
        raise ConfigError(
            f"{show('launcher.nodes', launcher.nodes)}: must be at most {longest * span:,}, as this cluster's arrays hold "
            f"{longest:,} jobs"
        )
    wanted = launcher.partition or os.environ.get("SBATCH_PARTITION")
    minutes = max_minutes(_scontrol("partition", "--oneliner").splitlines(), wanted.split(",") if wanted else None)
    if minutes is not None and launcher.timeout_min > minutes:
        partition = f"partition {wanted}" if wanted else "the default partition"
        raise ConfigError(
            f"{show('launcher.timeout_min', launcher.timeout_min)}: must be at most {minutes}, the limit of {partition}; "
            "a job that reaches it goes back into the queue and on from there"
        )


def max_array_size(shown: str) -> int | None:
    """Of `scontrol show config`: one more than the highest index."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return int(found[1]) if found else None


def max_minutes(shown: Iterable[str], wanted: list[str] | None) -> int | None:
    """Of lines of `scontrol show partition --oneliner`: the longest time limit of the wanted ones, which SLURM chooses among, or
    of the default. None: there is no limit, or none that is known."""
    limits = []
    for line in shown:
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields["PartitionName"] in wanted if wanted else fields["Default"] == "YES":
            limits.append(DURATION.fullmatch(fields["MaxTime"]))
    if not limits or None in limits:
        return None
    return max(_minutes(*limit.groups()) for limit in limits if limit)


def _minutes(days: str | None, hours: str, minutes: str, seconds: str) -> int:
    return int(days or 0) * 1440 + int(hours) * 60 + int(minutes)


def _scontrol(*what: str) -> str:
    """Empty when it does not answer."""
    try:
        done = subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
