"""How a file appears: whole, on disk, and under a name that only the first writer gets.

This module owns the one primitive on which exactly-once rests. A file is written under a dotted temporary name in its own
folder, fsynced, and given its final name by `link`, which fails when the name exists, on NFS and Lustre too. Where a file
system has no links, `renameat2(RENAME_NOREPLACE)` does the same. Modules that keep state call `os.<name>` by attribute, so
that tests can stop a process between any two of these calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import secrets
import socket
from pathlib import Path

from batchinfer.config import ConfigError

AT_FDCWD, RENAME_NOREPLACE = -100, 1  # linux/fcntl.h, linux/fs.h
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
NO_RENAME_FLAG = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})


class Published(enum.Enum):
    WON = "won"
    LOST = "lost"  # the name existed already: somebody else's file


def temporary(final: Path) -> Path:
    """A dotted name in the same folder that no other process, host or call uses."""
    host = socket.gethostname()[:40]
    return final.with_name(f".{final.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def publish(tmp: Path, final: Path) -> Published:
    """Give the closed file `tmp` the name `final`, unless that name is taken. `tmp` is gone afterwards.

    After WON or LOST the name survives a power cut. Raises OSError, naming the path, where the file system can do
    neither exclusive links nor exclusive renames, and FileNotFoundError when `tmp` was removed before anybody published.
    """
    try:
        won = _publish_synced(tmp, final)
        sync_folder(final.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
    return Published.WON if won else Published.LOST


def publish_bytes(final: Path, data: bytes) -> Published:
    """Publish a small file."""
    tmp = temporary(final)
    _write(tmp, data)
    return publish(tmp, final)


def replace_bytes(final: Path, data: bytes, durable: bool = False) -> None:
    """Overwrite a small file atomically. `durable` pays for two fsyncs; a heartbeat does not need them."""
    tmp = temporary(final)
    _write(tmp, data)
    try:
        if durable:
            _sync(tmp)
        os.replace(tmp, final)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise
    if durable:
        sync_folder(final.parent)


def probe(folder: Path) -> None:
    """Check that `folder` can hold a run. Raises ConfigError: not writable, read-only, full, or no exclusive publishing."""
    final = temporary(folder / "probe")
    try:
        outcomes = [publish_bytes(final, data) for data in (b"first", b"second")]
        kept = final.read_bytes()
    except OSError as error:
        hint = "choose a folder that is writable and not full"
        raise ConfigError(f"output.dir: cannot write in {folder} ({error.strerror}); {hint}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(final)
    if outcomes != [Published.WON, Published.LOST] or kept != b"first":
        raise ConfigError(f"output.dir: the file system of {folder} lets two writers take one name; choose another one")


def _publish_synced(tmp: Path, final: Path) -> bool:
    """fsync `tmp`, then take the name. The file stays open meanwhile, so that its inode number cannot be used anew."""
    try:
        fd = os.open(tmp, os.O_RDONLY)
    except FileNotFoundError:
        return _lost_or_raise(final)
    try:
        os.fsync(fd)
        return _take_name(tmp, final, os.fstat(fd))
    finally:
        os.close(fd)


def _take_name(tmp: Path, final: Path, ours: os.stat_result) -> bool:
    try:
        _link(tmp, final)
    except FileExistsError:
        # An NFS client repeats a request whose answer was lost, and then sees its own success as a failure.
        return _is_same_file(final, ours)
    except FileNotFoundError:
        return _is_same_file(final, ours) or _lost_or_raise(final)
    return True


def _link(tmp: Path, final: Path) -> None:
    try:
        os.link(tmp, final)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _rename_exclusive(tmp, final)


def _rename_exclusive(tmp: Path, final: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(tmp), AT_FDCWD, os.fsencode(final), RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code in NO_RENAME_FLAG:
        reason = "the file system supports neither hard links nor exclusive renames, so two writers could take one name"
        raise OSError(code, reason, str(final.parent))
    raise OSError(code, os.strerror(code), str(final))  # becomes FileExistsError and so on, by its code


def _is_same_file(final: Path, ours: os.stat_result) -> bool:
    try:
        there = os.stat(final)
    except FileNotFoundError:  # already moved on by a later generation
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _lost_or_raise(final: Path) -> bool:
    """Our temporary file is gone: cleaned away, which is fine only when somebody else's file has the name."""
    os.stat(final)
    return False


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        os.unlink(path)
        error.filename = str(path)  # os.write does not know it, and "No space left on device" alone helps nobody
        raise
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not know fsync on folders
            raise
