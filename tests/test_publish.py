from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import ConfigError
from batchinfer.publish import Published, probe, publish, publish_bytes, replace_bytes, temporary


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refuse(code: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    return call


class FakeLibc:
    """A libc whose renameat2 always fails with `code`."""

    def __init__(self, code: int) -> None:
        self.code = code

    def renameat2(self, *args: Any) -> int:
        ctypes.set_errno(self.code)
        return -1


def test_first_writer_wins_and_temporaries_go(tmp_path: Path) -> None:
    final = tmp_path / "000001.0.json"
    assert publish(write(temporary(final), b"one"), final) is Published.WON
    assert publish(write(temporary(final), b"two"), final) is Published.LOST
    assert final.read_bytes() == b"one"
    assert os.listdir(tmp_path) == [final.name]


def test_temporary_names_are_dotted_unique_and_beside_the_final(tmp_path: Path) -> None:
    names = {temporary(tmp_path / "a.json") for _ in range(100)}
    assert len(names) == 100
    assert all(n.parent == tmp_path and n.name.startswith(".a.json.") and n.name.endswith(".tmp") for n in names)


def test_one_winner_among_threads(tmp_path: Path) -> None:
    final, outcomes = tmp_path / "x", []
    barrier = threading.Barrier(8)

    def work(i: int) -> None:
        barrier.wait()
        outcomes.append((publish_bytes(final, b"%d" % i), i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    winners = [i for outcome, i in outcomes if outcome is Published.WON]
    assert len(outcomes) == 8 and [b"%d" % i for i in winners] == [final.read_bytes()]


def test_data_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real_fsync, real_link, real_unlink = os.fsync, os.link, os.unlink
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1])
    monkeypatch.setattr(os, "link", lambda a, b: (calls.append("link"), real_link(a, b))[1])
    monkeypatch.setattr(os, "unlink", lambda p: (calls.append("unlink"), real_unlink(p))[1])
    tmp = write(temporary(tmp_path / "x"), b"x")
    publish(tmp, tmp_path / "x")
    assert calls == [str(tmp), "link", str(tmp_path), "unlink"]


def test_nfs_reports_our_success_as_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_link = os.link

    def link(src: Path, dst: Path) -> None:
        real_link(src, dst)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", link)
    assert publish_bytes(tmp_path / "x", b"x") is Published.WON
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_links_an_exclusive_rename_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "link", refuse(code))
    assert publish_bytes(tmp_path / "x", b"one") is Published.WON
    assert publish_bytes(tmp_path / "x", b"two") is Published.LOST
    assert (tmp_path / "x").read_bytes() == b"one" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("code", [errno.EEXIST, errno.ENOENT])
def test_a_repeated_rename_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class Repeating(FakeLibc):
        def renameat2(self, old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> int:
            os.rename(old, new)
            return super().renameat2()

    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: Repeating(code))
    assert publish_bytes(tmp_path / "x", b"one") is Published.WON
    assert os.listdir(tmp_path) == ["x"]


def test_neither_links_nor_renames_is_one_sentence_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: FakeLibc(errno.EINVAL))
    with pytest.raises(OSError, match="neither hard links nor exclusive renames") as caught:
        publish_bytes(tmp_path / "x", b"x")
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match="neither hard links nor exclusive renames"):
        probe(tmp_path)


def test_a_vanished_temporary_is_lost_when_the_name_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "x", b"theirs")
    assert publish(tmp_path / ".gone.tmp", tmp_path / "x") is Published.LOST
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / ".gone.tmp", tmp_path / "y")


def test_a_temporary_that_vanishes_before_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.ENOENT))
    with pytest.raises(FileNotFoundError):
        publish_bytes(tmp_path / "x", b"ours")
    write(tmp_path / "x", b"theirs")
    assert publish_bytes(tmp_path / "x", b"ours") is Published.LOST


def test_folders_that_refuse_fsync_are_tolerated_but_files_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync = os.fsync

    def only_files(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", only_files)
    assert publish_bytes(tmp_path / "x", b"x") is Published.WON
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        publish_bytes(tmp_path / "y", b"y")
    assert os.listdir(tmp_path) == ["x"]


def test_replace_bytes_overwrites_whole_files(tmp_path: Path) -> None:
    for durable, data in ((False, b"one"), (True, b"two"), (False, b"")):
        replace_bytes(tmp_path / "x", data, durable=durable)
        assert (tmp_path / "x").read_bytes() == data
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", refuse(errno.ENOSPC))
    for call in (publish_bytes, replace_bytes):
        with pytest.raises(OSError, match="No space left") as caught:
            call(tmp_path / "x", b"data")
        assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:3]))
    publish_bytes(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_probe_leaves_nothing_and_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match="No such file"):
        probe(tmp_path / "missing")
    for code, words in ((errno.EROFS, "Read-only"), (errno.EACCES, "Permission denied")):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=words):
            patch.setattr(os, "open", refuse(code))
            probe(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="No space left"):
        patch.setattr(os, "write", refuse(errno.ENOSPC))
        probe(tmp_path)


def test_probe_refuses_a_file_system_that_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", os.replace)
    with pytest.raises(ConfigError, match="two writers take one name"):
        probe(tmp_path)
