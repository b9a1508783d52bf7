"""One process's messages to others on its host: a ring of slots in shared memory, and semaphores that say what is in it.

Rank 0 writes, ranks 1 to R each read every message. It is the bounded buffer of the textbooks, once per reader: `filled`
counts the slots that the reader has yet to read, `free` those that the writer may overwrite as far as this reader goes. For a
slot the writer takes one `free` of every reader, copies, and posts `filled` to every reader; so it waits for the slowest. A
message longer than a slot goes through as many as it needs, and may be longer than the ring: readers copy out as it comes.

*Order of memory.* Python has no fences, and on ARM two plain stores may become visible in the other order. So no plain store
announces anything: a side touches a slot only between its own wait and post, and POSIX has `sem_wait` and `sem_post` synchronise
memory (glibc: an acquire and a release). A slot's bytes are written before the writer posts `filled`, after which the reader's
wait returns; they are read before the reader posts `free`, after which the writer's wait for that slot returns.

*Waiting* burns nothing: a semaphore that is up is taken without a system call, else the process sleeps in the kernel until the
post. Every POLL_S it looks whether the other side still lives: rank 0 may have nothing to say for hours, but not when dead.

*Nothing is left behind*, whoever dies and when: the memory is a memfd, a file that never has a name. Readers open it through
rank 0's entry in /proc, and the kernel frees it with the last process that maps it. It counts as memory of the job's and not
against the size of /dev/shm, which containers keep small.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import time
from dataclasses import dataclass

import numpy as np

from batchinfer.job.process import boot_id, is_alive, start_time

POLL_S = 1.0  # how often a process that waits looks whether the other one lives
STALL_S = 600.0  # a reader that lives and takes nothing for so long is stuck
LINE_BYTES = 128  # what two cores write lies so far apart: cache lines of ARM, pairs of lines of x86
SEM_BYTES = 32  # sizeof(sem_t) on 64-bit Linux, glibc and musl
MFD_CLOEXEC = 1  # linux/memfd.h
PROCESS = struct.Struct("qq")  # pid, start time
LEFT = struct.Struct("q")  # heads a slot: bytes of the message from this slot on


class RingError(RuntimeError):
    """The other side of a ring is dead or stuck: one sentence says who, and for how long it was waited for."""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


# `os.memfd_create` is missing where Python was built for an old glibc (conda), though the host's has it. Calls that return at
# once keep the interpreter lock: when another thread computes, giving it up can cost 5 ms.
_libc, _quick_libc = ctypes.CDLL(None, use_errno=True), ctypes.PyDLL(None)
_libc.memfd_create.argtypes = (ctypes.c_char_p, ctypes.c_uint)
_libc.sem_timedwait.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Timespec))
_quick_libc.sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
_quick_libc.sem_post.argtypes = _quick_libc.sem_trywait.argtypes = (ctypes.c_void_p,)


class _Semaphore:
    """A POSIX semaphore at an offset of memory that processes share."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = (ctypes.c_char * SEM_BYTES).from_buffer(memory, offset)  # keeps the mapping
        self._address = ctypes.c_void_p(ctypes.addressof(self._memory))

    def init(self, value: int) -> None:
        """To be called once, before another process can."""
        _quick_libc.sem_init(self._address, 1, value)

    def post(self) -> None:
        _quick_libc.sem_post(self._address)

    def take_now(self) -> bool:
        taken: bool = _quick_libc.sem_trywait(self._address) == 0
        return taken

    def take(self, timeout_s: float) -> bool:
        """False: it stayed down for `timeout_s` of the wall clock, which somebody may set meanwhile."""
        deadline = time.time() + timeout_s
        until = _Timespec(int(deadline), int(deadline % 1 * 1e9))
        while _libc.sem_timedwait(self._address, until) != 0:  # a signal interrupts it, and then Python runs the handler
            if ctypes.get_errno() == errno.ETIMEDOUT:
                return False
        return True


@dataclass(frozen=True)
class Peer:
    """A rank's process, so exactly that another one of its host can tell whether it lives."""

    rank: int
    pid: int
    started: int

    @classmethod
    def here(cls, rank: int) -> Peer:
        started = start_time(os.getpid())
        assert started is not None, "this process is alive"
        return cls(rank, os.getpid(), started)

    def is_alive(self) -> bool:
        return is_alive(self.pid, self.started)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"


@dataclass(frozen=True)
class RingShape:
    """Sizes of a ring, and where its parts lie: who is who, two semaphores per reader, the slots."""

    num_readers: int
    num_slots: int = 8  # more steps than rank 0 is ever ahead, or 2 MiB of one batch
    slot_bytes: int = 256 << 10  # a step of 512 sequences with block tables of 100 blocks

    @property
    def semaphores(self) -> int:
        return -(-(1 + self.num_readers) * PROCESS.size // LINE_BYTES) * LINE_BYTES

    @property
    def slots(self) -> int:
        return self.semaphores + 2 * self.num_readers * LINE_BYTES

    @property
    def slot_stride(self) -> int:
        return LINE_BYTES + -(-self.slot_bytes // LINE_BYTES) * LINE_BYTES

    @property
    def num_bytes(self) -> int:
        return self.slots + self.num_slots * self.slot_stride


@dataclass(frozen=True)
class RingAddress:
    """Where processes find a ring: a file that `writer` has open. Means something only where `place` is the same."""

    place: tuple[str, str]
    writer: Peer
    fd: int
    shape: RingShape

    @staticmethod
    def here() -> tuple[str, str]:
        """The place of this process: boot of a host, namespace of its process ids."""
        return boot_id(), os.readlink("/proc/self/ns/pid")


class _Memory:
    """A ring as one process has mapped it."""

    def __init__(self, fd: int, shape: RingShape) -> None:
        self.map = mmap.mmap(fd, shape.num_bytes)
        semaphores = [_Semaphore(self.map, shape.semaphores + i * LINE_BYTES) for i in range(2 * shape.num_readers)]
        self.filled, self.free = semaphores[0::2], semaphores[1::2]  # of each reader
        slots = memoryview(self.map)[shape.slots :]
        starts = range(0, len(slots), shape.slot_stride)
        self.heads = [slots[start : start + LEFT.size] for start in starts]
        self.bodies = [slots[start + LINE_BYTES :][: shape.slot_bytes] for start in starts]

    def sign(self, peer: Peer) -> None:
        """Leave word who has this rank."""
        PROCESS.pack_into(self.map, peer.rank * PROCESS.size, peer.pid, peer.started)

    def signed(self, rank: int) -> Peer:
        return Peer(rank, *PROCESS.unpack_from(self.map, rank * PROCESS.size))


class RingWriter:
    """Rank 0's end, for one thread: once all readers are attached, `seal` it, then `put`."""

    def __init__(self, shape: RingShape, stall_s: float = STALL_S) -> None:
        fd = _libc.memfd_create(b"batchinfer-ring", MFD_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), f"memfd_create: {os.strerror(ctypes.get_errno())}")
        os.truncate(fd, shape.num_bytes)
        self.address = RingAddress(RingAddress.here(), Peer.here(0), fd, shape)
        self._memory = _Memory(fd, shape)
        self._memory.sign(self.address.writer)
        for filled, free in zip(self._memory.filled, self._memory.free, strict=True):
            filled.init(0)
            free.init(shape.num_slots)
        self._stall_s = stall_s
        self._next = 0  # slot
        self._failure = ""

    def seal(self) -> None:
        """Every reader is attached, or will never be."""
        os.close(self.address.fd)

    def put(self, message: bytes | memoryview) -> None:
        """Copy the message (one-dimensional, of bytes) to all readers; 0 bytes are a message too.

        Returns when they can have it. RingError: a reader is dead or stuck while the ring is full; so is every later `put`.
        """
        view = memoryview(message)
        size = self.address.shape.slot_bytes
        for begin in range(0, len(view) or 1, size):
            self._wait_for_readers()
            part = view[begin : begin + size]
            LEFT.pack_into(self._memory.heads[self._next], 0, len(view) - begin)
            self._memory.bodies[self._next][: len(part)] = part
            for filled in self._memory.filled:
                filled.post()
            self._next = (self._next + 1) % self.address.shape.num_slots

    def _wait_for_readers(self) -> None:
        if self._failure:
            raise RingError(self._failure)
        for rank, free in enumerate(self._memory.free, start=1):
            if not free.take_now():
                self._wait_for(free, self._memory.signed(rank))

    def _wait_for(self, free: _Semaphore, reader: Peer) -> None:
        # Time is counted in waits: a job that SLURM suspends for an hour was not waiting.
        waited_s = 0.0
        while not free.take(POLL_S):
            waited_s += POLL_S
            if not reader.is_alive():
                self._failure = f"{reader} died: it left the ring of batches full"
            elif waited_s >= self._stall_s:
                self._failure = f"{reader} took no batch for {waited_s:.0f} s while the ring of batches was full"
            if self._failure:
                raise RingError(self._failure)


class RingReader:
    """The end of one of the ranks 1 to R, for one thread.

    OSError: this process cannot open the writer's file: it is in another place, or may not look into that process.
    """

    def __init__(self, address: RingAddress, rank: int) -> None:
        if address.place != RingAddress.here():
            raise OSError("rank 0 is on another host or in another namespace of processes")
        fd = os.open(f"/proc/{address.writer.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = _Memory(fd, address.shape)
        finally:
            os.close(fd)
        self._memory.sign(Peer.here(rank))
        self._writer = address.writer
        self._num_slots = address.shape.num_slots
        self._filled, self._free = self._memory.filled[rank - 1], self._memory.free[rank - 1]
        self._next = 0  # slot

    def get(self) -> np.ndarray:
        """The next message as bytes [n] uint8 that are this process's own. Waits for as long as the writer lives.

        RingError: the writer is dead and has left no whole message.
        """
        self._wait()
        size: int = LEFT.unpack_from(self._memory.heads[self._next])[0]
        message = np.empty(size, dtype=np.uint8)
        view, done = message.data, 0
        while True:
            body = self._memory.bodies[self._next]
            part = min(len(body), size - done)
            view[done : done + part] = body[:part]
            done += part
            self._free.post()
            self._next = (self._next + 1) % self._num_slots
            if done == size:
                return message
            self._wait()

    def _wait(self) -> None:
        if self._filled.take_now():
            return
        begin = time.monotonic()
        while not self._filled.take(POLL_S):
            if not self._writer.is_alive():
                if self._filled.take_now():  # its last word
                    return
                waited_s = time.monotonic() - begin
                raise RingError(f"{self._writer} died: this rank had waited {waited_s:.0f} s for its next batch")
