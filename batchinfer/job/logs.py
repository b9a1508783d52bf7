"""What the replicas of one submission log, line by line as it comes: for `verbose=true` and for nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator

from batchinfer.job.rundir import RunDir


class LogFollower:
    """Reads the logs of a submission's replicas again and again; every whole line is given once."""

    def __init__(self, run_dir: RunDir, submission: int) -> None:
        self._run_dir, self._prefix = run_dir, f"{submission:02d}-"
        self._read: dict[str, int] = {}  # replica -> bytes of its log already given

    def lines(self) -> Iterator[str]:
        """The lines that are new since the last call, each behind its replica's name."""
        for name in sorted(os.listdir(self._run_dir.replicas)):
            if name.startswith(self._prefix):
                yield from (f"{name} {line}" for line in self._new_lines(name))

    def _new_lines(self, name: str) -> list[str]:
        try:
            with open(self._run_dir.replica(name) / "log.txt", "rb") as log:
                log.seek(self._read.get(name, 0))
                text = log.read()
        except FileNotFoundError:  # its folder comes first
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read[name] = self._read.get(name, 0) + len(whole)
        return whole.decode(errors="replace").splitlines()
