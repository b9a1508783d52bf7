"""The failure of a submission: what every further try would end by, found out on a node, and told once, in
`submissions/<NN>/failed.json`.

Jobs of the submission look for it where they look for `cancel`: one that starts later starts no replica, one that works stops. A
later submission has a folder of its own, so `resume` begins anew.

On a full disk even this small file finds no space. So each submission sets some aside when it is made, and who has a failure to
tell gives it free first.
"""

from __future__ import annotations

import enum
import json
import os
import time
from dataclasses import asdict, dataclass, field

from batchinfer.job.rundir import RunDir
from batchinfer.publish import publish_bytes, sync_folder

FILE, RESERVE = "failed.json", "reserve"
RESERVE_BYTES = 64 << 10


class Cause(enum.StrEnum):
    REQUEST = "request"  # what it names cannot be used: a file, a device, a setting
    DISK = "disk"  # there is no space for the run's files, or they cannot be written

    @property
    def remedy(self) -> str:
        return "what is committed stays; make room, then" if self is Cause.DISK else "no other try is made; put it right, then"


@dataclass(frozen=True)
class Failure:
    """`reason`: the start of a sentence. `replica`: who found out, empty: the job itself. `log`: where it tells more."""

    reason: str
    cause: Cause
    replica: str
    node: str
    log: str
    time: float = field(default_factory=time.time)  # seconds since the Unix epoch, on the clock of its node

    @classmethod
    def of_disk(cls, run_dir: RunDir, error: OSError, node: str, log: str) -> Failure:
        """Found out by writing there."""
        return cls(cannot_write(run_dir, error), Cause.DISK, "", node, log)

    def sentence(self, run_dir: RunDir) -> str:
        who = f"replica {self.replica} on {self.node}" if self.node else f"replica {self.replica}"
        found = f"found by {who if self.replica else self.node}; log: {self.log}"
        return f"{self.reason} ({found}); {self.cause.remedy}: python -m batchinfer resume {run_dir.root}"


def cannot_write(run_dir: RunDir, error: OSError) -> str:
    return f"output.dir={run_dir.root} cannot be written any more: {error.strerror}"


def set_aside(run_dir: RunDir, submission: int) -> None:
    """Space for a failure. Raises OSError."""
    with open(run_dir.submission(submission) / RESERVE, "xb") as file:
        file.write(os.urandom(RESERVE_BYTES))  # which no file system makes smaller
        file.flush()
        os.fsync(file.fileno())


def publish_failure(run_dir: RunDir, submission: int, failure: Failure) -> bool:
    """The first one counts. False: it cannot be written."""
    folder = run_dir.submission(submission)
    try:
        (folder / RESERVE).unlink(missing_ok=True)
        sync_folder(folder)
        publish_bytes(folder / FILE, json.dumps(asdict(failure), indent=1).encode())
    except OSError:
        return False
    return True


def has_failed(run_dir: RunDir, submission: int) -> bool:
    """Cheap enough for every job to ask every second."""
    return (run_dir.submission(submission) / FILE).exists()


def read_failure(run_dir: RunDir, submission: int) -> Failure | None:
    """By a listing, as that is what makes an NFS client ask its server whether there is something new."""
    folder = run_dir.submission(submission)
    if FILE not in os.listdir(folder):
        return None
    raw = json.loads((folder / FILE).read_bytes())
    return Failure(**{**raw, "cause": Cause(raw["cause"])})


def newest_failure(run_dir: RunDir) -> Failure | None:
    """Of the last submission: what came before it has been put right, or is found again."""
    newest = max((int(name) for name in os.listdir(run_dir.submissions) if name.isdecimal()), default=None)
    return None if newest is None else read_failure(run_dir, newest)
