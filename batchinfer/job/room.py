"""Whether an output folder can take a run: it can be written, and there is room. Asked before anything is queued, and again on
the node when something has failed."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from batchinfer.config import ConfigError, show
from batchinfer.publish import temporary

MIB = 1 << 20
FLOOR_BYTES = 32 * MIB  # free, or a run is not begun: its logs, statistics and first commits, not all its results
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
LASTING = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, *NO_SPACE})  # others may pass
PROBE_BYTES = MIB  # really written, as a quota shows nowhere else


def check_room(folder: Path) -> None:
    """Raises ConfigError when a run in `folder`, which need not exist yet, could not write or would soon have no room."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    named = show("output.dir", str(folder))
    error = write_error(place)
    if error is not None:
        raise ConfigError(f"{named}: cannot write in {place} ({error.strerror}); choose a folder that is writable and not full")
    free = free_bytes(place)
    if free is not None and free < FLOOR_BYTES:
        raise ConfigError(
            f"{named}: must have at least {FLOOR_BYTES // MIB} MiB free, and its file system has {free / MIB:,.1f} MiB; "
            "free some, or choose another folder"
        )


def free_bytes(place: Path) -> int | None:
    """What this user may still take of a file system; None where it does not say. Quotas are not in it."""
    stats = os.statvfs(place)
    return stats.f_bavail * stats.f_frsize if stats.f_blocks else None


def lasting_error(folder: Path) -> OSError | None:
    """Why a folder that could be written cannot be any more: neither now nor on another try."""
    error = write_error(folder)
    return error if error is not None and error.errno in {errno.ENOENT, *LASTING} else None


def no_space(error: OSError) -> bool:
    return error.errno in NO_SPACE


def write_error(folder: Path) -> OSError | None:
    """What the system says when a file is written there, and on disk; None: it can be. Leaves nothing behind."""
    path = temporary(folder / "probe")
    try:
        with open(path, "xb", buffering=0) as file:
            left = memoryview(os.urandom(PROBE_BYTES))  # which no file system makes smaller
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return None
