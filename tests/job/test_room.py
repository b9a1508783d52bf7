"""Whether an output folder can take a run: on disks that are too small, full, read-only, or not there."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batchinfer.config import ConfigError
from batchinfer.job import room
from batchinfer.job.room import check_room, free_bytes, lasting_error, write_error

Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system in memory, by its mount options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode != 0:
            pytest.skip("needs the right to mount a tmpfs")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_room(folder)
    return str(caught.value)


def test_a_folder_to_be_made_is_fine_and_nothing_stays_behind(tmp_path: Path) -> None:
    check_room(tmp_path / "runs" / "one")
    assert os.listdir(tmp_path) == []


def test_a_small_disk(disk: Disk) -> None:
    folder = disk("size=20m") / "runs" / "one"
    assert refused(folder) == (
        f"output.dir={folder}: must have at least 32 MiB free, and its file system has 20.0 MiB; free some, or choose "
        "another folder"
    )


def test_a_full_disk(disk: Disk) -> None:
    folder = disk("size=100k")
    said = (
        f"output.dir={folder}: cannot write in {folder} (No space left on device); choose a folder that is writable and not full"
    )
    assert refused(folder) == said
    assert os.listdir(folder) == []


def test_a_read_only_disk(disk: Disk) -> None:
    folder = disk("ro")
    assert f"cannot write in {folder} (Read-only file system)" in refused(folder / "one")
    error = write_error(folder)
    assert error is not None and error.errno == errno.EROFS


def test_what_may_pass_is_no_lasting_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, lasts in ((errno.EIO, False), (errno.ESTALE, False), (errno.EDQUOT, True), (errno.EROFS, True)):
        monkeypatch.setattr(room, "write_error", lambda folder, code=code: OSError(code, "so it is"))
        assert (lasting_error(tmp_path) is not None) == lasts
    monkeypatch.undo()
    assert lasting_error(tmp_path) is None and lasting_error(tmp_path / "gone") is not None


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert re.search(r"cannot write in .*/file \(Not a directory\)", refused(tmp_path / "file" / "one"))


def test_a_file_system_that_does_not_say_how_full_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda place: os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255)))
    assert free_bytes(tmp_path) is None
    check_room(tmp_path)
