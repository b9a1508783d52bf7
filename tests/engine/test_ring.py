"""The ring between real processes: every message whole and in order, and a sentence when somebody dies."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine import ring
from batchinfer.engine.ring import RingError, RingReader, RingShape, RingWriter
from tests.engine.ring_processes import read_forever, read_rings, wait_idly, write_forever

Start = Callable[..., tuple[BaseProcess, Connection]]


@contextlib.contextmanager
def starting_processes() -> Iterator[Start]:
    """Starts `target(pipe, *arguments)` in new processes, all of which end with the context."""
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []

    def start(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return process, ours

    try:
        yield start
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture
def start() -> Iterator[Start]:
    with starting_processes() as start:
        yield start


@pytest.fixture(scope="module")
def readers() -> Iterator[list[Connection]]:
    with starting_processes() as start:
        yield [start(read_rings)[1] for _ in range(3)]


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "POLL_S", 0.05)


@st.composite
def traffic(draw: st.DrawFn) -> tuple[RingShape, list[bool], list[int]]:
    """A ring, which of its readers are slow, and sizes of messages: many end at or next to the border of a slot."""
    shape = RingShape(draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.sampled_from([2, 60, 128, 4096])))
    slow = draw(st.lists(st.booleans(), min_size=shape.num_readers, max_size=shape.num_readers))
    borders = [n * shape.slot_bytes + d for n in (1, 2, 5) for d in (-1, 0, 1)]
    size = st.one_of(st.integers(1, 4 * shape.slot_bytes), st.sampled_from(borders), st.integers(1, 20_000))
    return shape, slow, draw(st.lists(size, max_size=20))


def answer(pipe: Connection) -> object:
    assert pipe.poll(30), "a reader still waits"
    return pipe.recv()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(traffic())
def test_every_reader_gets_every_message(readers: list[Connection], drawn: tuple[RingShape, list[bool], list[int]]) -> None:
    shape, slow, sizes = drawn
    writer = RingWriter(shape)
    used = readers[: shape.num_readers]
    for rank, (pipe, pauses) in enumerate(zip(used, slow, strict=True), start=1):
        pipe.send((writer.address, rank, pauses))
    assert [answer(pipe) for pipe in used] == ["attached"] * len(used)
    writer.seal()
    rng, expected = random.Random(1), []
    for size in sizes:
        content = rng.randbytes(size)
        writer.put(content)
        expected.append((size, zlib.crc32(content)))
    writer.put(b"")
    assert [answer(pipe) for pipe in used] == [expected] * len(used)


def attached(shape: RingShape, stall_s: float = ring.STALL_S) -> tuple[RingWriter, list[RingReader]]:
    """Both ends in this process."""
    writer = RingWriter(shape, stall_s)
    ends = [RingReader(writer.address, rank) for rank in range(1, shape.num_readers + 1)]
    writer.seal()
    return writer, ends


def test_the_writer_waits_for_the_slowest_reader() -> None:
    writer, (quick, slow) = attached(RingShape(2, num_slots=2, slot_bytes=8))
    put: list[int] = []

    def write() -> None:
        for number in range(4):
            writer.put(bytes([number]))
            put.append(number)

    thread = threading.Thread(target=write)
    thread.start()
    assert [quick.get()[0] for _ in range(2)] == [0, 1]
    for taken in range(1, 3):
        thread.join(0.1)
        assert thread.is_alive() and len(put) == taken + 1, "it overwrote what a reader had not read"
        assert slow.get()[0] == taken - 1
    thread.join()
    assert [slow.get()[0] for _ in range(2)] == [2, 3] == [quick.get()[0] for _ in range(2)]


def test_a_message_belongs_to_its_reader() -> None:
    writer, (reader,) = attached(RingShape(1, num_slots=1, slot_bytes=8))
    writer.put(b"first")
    first = reader.get()
    writer.put(b"second")
    assert bytes(first) == b"first"
    first[:] = 0
    assert bytes(reader.get()) == b"second"


def test_the_shipped_shape_carries_a_batch_larger_than_the_ring(readers: list[Connection]) -> None:
    writer = RingWriter(RingShape(1))
    readers[0].send((writer.address, 1, False))
    assert readers[0].recv() == "attached"
    writer.seal()
    content = random.Random(2).randbytes(3 * writer.address.shape.num_bytes + 1)
    writer.put(content)
    writer.put(b"")
    assert readers[0].recv() == [(len(content), zlib.crc32(content))]


def test_a_reader_waits_for_a_quiet_writer_at_no_cost(start: Start) -> None:
    writer = RingWriter(RingShape(1), stall_s=0.1)
    _, pipe = start(wait_idly, writer.address, 1, 0.1)
    assert pipe.recv() == "attached"
    assert not pipe.poll(2)
    writer.put(b"at last")
    received, cpu_s = pipe.recv()
    assert received == b"at last"
    assert cpu_s < 0.1, "twenty looks at the writer take no CPU to speak of"


@pytest.mark.usefixtures("quick_polls")
@pytest.mark.parametrize("size", [100, 50_000], ids=["between messages", "within a message longer than the ring"])
def test_a_reader_of_a_killed_writer_says_so(start: Start, size: int) -> None:
    process, pipe = start(write_forever, 1, size, 1.0, 60.0)
    reader = RingReader(pipe.recv(), 1)
    pipe.send("go")
    assert bytes(reader.get()) == bytes(size)
    time.sleep(0.1)  # the ring is full again
    process.kill()
    begin = time.monotonic()
    with pytest.raises(
        RingError, match=rf"^rank 0 \(process {process.pid}\) died: this rank had waited \d+ s for its next batch$"
    ):
        for _ in range(3):
            reader.get()
    assert time.monotonic() - begin < 5


@pytest.mark.usefixtures("quick_polls")
def test_a_writer_that_dies_after_its_last_word_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, (reader,) = attached(RingShape(1))

    def speak_and_die(pid: int, started: int) -> bool:
        writer.put(b"stop")
        return False

    monkeypatch.setattr(ring, "is_alive", speak_and_die)
    assert bytes(reader.get()) == b"stop"


@pytest.mark.usefixtures("quick_polls")
def test_the_writer_to_a_killed_reader_says_so(start: Start) -> None:
    writer = RingWriter(RingShape(2, num_slots=2))
    (victim, pipe), (_, other) = (start(read_forever, writer.address, rank) for rank in (1, 2))
    assert (pipe.recv(), other.recv()) == ("attached", "attached")
    writer.seal()
    writer.put(b"0")
    victim.kill()
    sentence = rf"^rank 1 \(process {victim.pid}\) died: it left the ring of batches full$"
    begin = time.monotonic()
    with pytest.raises(RingError, match=sentence):
        for _ in range(4):
            writer.put(b"1")
    assert time.monotonic() - begin < 5
    with pytest.raises(RingError, match=sentence):
        writer.put(b"")


@pytest.mark.usefixtures("quick_polls")
def test_the_writer_gives_up_on_a_reader_that_lives_and_reads_nothing() -> None:
    writer, _ = attached(RingShape(1, num_slots=1), stall_s=1.0)
    writer.put(b"0")
    begin = time.monotonic()
    with pytest.raises(
        RingError, match=rf"^rank 1 \(process {os.getpid()}\) took no batch for 1 s while the ring of batches was"
    ):
        writer.put(b"1")
    assert 0.9 < time.monotonic() - begin < 5
    begin = time.monotonic()
    with pytest.raises(RingError, match=r"took no batch for 1 s"):  # at once: the engine that fails also says stop
        writer.put(b"")
    assert time.monotonic() - begin < 0.9


def test_time_in_which_the_writer_was_suspended_does_not_count(start: Start) -> None:
    process, pipe = start(write_forever, 1, 10, 0.2, 1.0)
    reader = RingReader(pipe.recv(), 1)
    pipe.send("go")
    reader.get()
    time.sleep(0.2)  # the ring is full again, and it waits
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert [reader.get()[0] for _ in range(9)] == list(range(1, 10))


def test_only_the_processes_of_the_writers_place_can_attach_and_only_until_it_is_sealed() -> None:
    writer = RingWriter(RingShape(1))
    boot, namespace = writer.address.place
    for place in (("another boot", namespace), (boot, "pid:[1]")):
        with pytest.raises(OSError, match="rank 0 is on another host"):
            RingReader(dataclasses.replace(writer.address, place=place), 1)
    writer.seal()
    with pytest.raises(OSError, match="No such file"):
        RingReader(writer.address, 1)


def shared_files(pid: int | None) -> list[str]:
    """What a process may write to others' sight, from its memory map: device, inode and path of each file."""
    fields = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return [" ".join(f[3:]) for f in fields if f[1].startswith("rw") and f[1].endswith("s")]


def anybody_maps(file: str) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if file in shared_files(int(folder.name)):
                return True
    return False


@pytest.mark.parametrize("moment", ["before a reader attached", "while one is attached", "while batches flow"])
def test_nothing_is_left_behind_by_processes_that_are_killed(start: Start, moment: str) -> None:
    writer, pipe = start(write_forever, 2, 50_000, 1.0, 60.0)
    address = pipe.recv()
    (file,) = shared_files(writer.pid)
    assert "memfd:batchinfer-ring" in file
    assert os.stat(f"/proc/{writer.pid}/fd/{address.fd}").st_nlink == 0, "it has a name"
    processes = [writer]
    for rank in range(1, {"before a reader attached": 0, "while one is attached": 1, "while batches flow": 2}[moment] + 1):
        process, reader_pipe = start(read_forever, address, rank)
        assert reader_pipe.recv() == "attached"
        assert shared_files(process.pid) == [file]
        processes.append(process)
    if len(processes) == 3:
        pipe.send("go")
        time.sleep(0.2)
    assert anybody_maps(file)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert not anybody_maps(file)
