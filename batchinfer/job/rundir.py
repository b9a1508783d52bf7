"""Where everything of a run lies: the one place that knows the layout of a run directory.

Names are by number and existence means done, so that a listing is the state. See docs/architecture.md for what each file
holds. Nothing here waits, locks, or reads more than a name, apart from the small stop mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from batchinfer.config import ConfigError
from batchinfer.publish import probe, replace_bytes

FOLDERS = ("claims", "completions", "superseded", "partials", "attempts", "stats", "replicas", "submissions")
TEMPORARY = re.compile(r"\..+-\d+-[0-9a-f]{8}\.tmp")  # as publish.temporary names them
T = TypeVar("T")
NUMBERED = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.(0|[1-9][0-9]*)\.(json|parquet)")  # each pair of numbers has one name


@dataclass(frozen=True)
class RunDir:
    root: Path

    @property
    def config_yaml(self) -> Path:
        return self.root / "config.yaml"

    @property
    def manifest_json(self) -> Path:
        """Its existence is the run's existence."""
        return self.root / "manifest.json"

    @property
    def weights_json(self) -> Path:
        return self.root / "weights.json"

    @property
    def cancelled(self) -> Path:
        return self.root / "CANCELLED"

    @property
    def claims(self) -> Path:
        return self.root / "claims"

    @property
    def completions(self) -> Path:
        return self.root / "completions"

    @property
    def superseded(self) -> Path:
        return self.root / "superseded"

    @property
    def partials(self) -> Path:
        return self.root / "partials"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def stats(self) -> Path:
        return self.root / "stats"

    @property
    def replicas(self) -> Path:
        return self.root / "replicas"

    @property
    def submissions(self) -> Path:
        return self.root / "submissions"

    @property
    def retries(self) -> Path:
        """Made by the first retry."""
        return self.root / "retries"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def claim(self, unit: int, epoch: int) -> Path:
        return self.claims / f"{unit:06d}.{epoch}.json"

    def completion(self, unit: int, generation: int) -> Path:
        return self.completions / f"{unit:06d}.{generation}.parquet"

    def partial(self, unit: int, epoch: int) -> Path:
        return self.partials / f"{unit:06d}.{epoch}.parquet"

    def attempt(self, unit: int, number: int) -> Path:
        return self.attempts / f"{unit:06d}.{number}.json"

    def replica(self, replica: str) -> Path:
        return self.replicas / replica

    def progress(self, replica: str) -> Path:
        return self.replica(replica) / "progress.json"

    def environment(self, replica: str) -> Path:
        """What a replica ran on and with."""
        return self.replica(replica) / "environment.json"

    def retry_json(self, number: int) -> Path:
        """What a retry is to do, frozen when it was asked for."""
        return self.retries / f"{number:02d}.json"

    def submission(self, number: int) -> Path:
        return self.submissions / f"{number:02d}"

    def submission_json(self, number: int) -> Path:
        """What a submission was asked: its effective config, so that a resume may change hardware and engine."""
        return self.submission(number) / "submission.json"

    def create(self) -> None:
        """Make the folders and check that they can hold a run. Raises ConfigError when they cannot."""
        try:
            for name in FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "choose a folder that is writable"
            raise ConfigError(f"output.dir: cannot make {error.filename} ({error.strerror}); {hint}") from error
        probe(self.completions)

    def new_submission(self) -> tuple[int, Path]:
        """The next submission number and its new folder. Two callers never get the same."""
        number = max((int(name) for name in os.listdir(self.submissions) if name.isdecimal()), default=0) + 1
        while not _mkdir(self.submission(number)):
            number += 1
        return number, self.submission(number)

    def new_replica(self, base: str) -> str:
        """A replica name that nobody has used in this run, with its new folder: `base`, `base.1`, `base.2`, ..."""
        name, number = base, 0
        while not _mkdir(self.replica(name)):
            number += 1
            name = f"{base}.{number}"
        return name

    def done_units(self) -> dict[int, int]:
        """Highest generation of every unit that has one; one listing."""
        done: dict[int, int] = {}
        for name in os.listdir(self.completions):
            parsed = parse_completion(name)
            if parsed is not None:
                done[parsed[0]] = max(parsed[1], done.get(parsed[0], 0))
        return done

    def partial_epochs(self, unit: int) -> list[int]:
        """Epochs of which there is something in partials/ for a unit, the newest first; one listing."""
        found = (parse_partial(name) for name in os.listdir(self.partials))
        return sorted((parsed[1] for parsed in found if parsed is not None and parsed[0] == unit), reverse=True)

    def attempt_numbers(self, unit: int) -> list[int]:
        """Numbers of the attempts with a unit, in order; one listing."""
        found = (parse_attempt(name) for name in os.listdir(self.attempts))
        return sorted(parsed[1] for parsed in found if parsed is not None and parsed[0] == unit)

    def remove_partials(self, unit: int) -> None:
        """For a unit that is done. What a replica that stood still saves later stays behind, and nobody reads it."""
        for epoch in self.partial_epochs(unit):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.partial(unit, epoch))

    def read_committed(self, unit: int, generation: int, read: Callable[[Path], T]) -> T:
        """What `read` makes of a committed file, wherever it lies: a retry may have moved it since it was listed."""
        path = self.completion(unit, generation)
        try:
            return read(path)
        except FileNotFoundError:
            return read(self.superseded / path.name)

    def supersede(self) -> None:
        """Move every completions file that a higher generation has replaced. Safe to repeat after a crash."""
        for unit, generation in self.done_units().items():
            self.supersede_unit(unit, generation)

    def supersede_unit(self, unit: int, generation: int) -> None:
        """Move the generations before a committed one."""
        for older in range(generation):
            name = self.completion(unit, older).name
            with contextlib.suppress(FileNotFoundError):  # moved before, or by somebody else
                os.rename(self.completions / name, self.superseded / name)

    def clean_temporaries(self) -> int:
        """Remove what killed writers left behind; returns how many files. Only for a run in which nothing works any more."""
        removed = 0
        for folder, _, names in os.walk(self.root):
            for name in filter(TEMPORARY.fullmatch, names):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
                    removed += 1
        return removed

    def cancel(self, up_to_submission: int) -> None:
        """Stop the jobs of all submissions up to this number, for good. A later resume is a new submission."""
        up_to = max(up_to_submission, self._cancelled_up_to())
        replace_bytes(self.cancelled, json.dumps({"up_to": up_to}).encode(), durable=True)

    def is_cancelled(self, submission: int) -> bool:
        return submission <= self._cancelled_up_to()

    def _cancelled_up_to(self) -> int:
        try:
            return int(json.loads(self.cancelled.read_bytes())["up_to"])
        except FileNotFoundError:
            return -1


def parse_completion(name: str) -> tuple[int, int] | None:
    """(unit, generation) of a file name in completions/, None for any other name."""
    return _parse(name, "parquet")


def parse_partial(name: str) -> tuple[int, int] | None:
    """(unit, epoch) of a file name in partials/, None for any other name."""
    return _parse(name, "parquet")


def parse_claim(name: str) -> tuple[int, int] | None:
    """(unit, epoch) of a file name in claims/, None for any other name."""
    return _parse(name, "json")


def parse_attempt(name: str) -> tuple[int, int] | None:
    """(unit, number) of a file name in attempts/, None for any other name."""
    return _parse(name, "json")


def _parse(name: str, suffix: str) -> tuple[int, int] | None:
    match = NUMBERED.fullmatch(name)
    return (int(match[1]), int(match[2])) if match is not None and match[3] == suffix else None


def _mkdir(path: Path) -> bool:
    try:
        os.mkdir(path)
    except FileExistsError:
        return False
    return True
