"""Safetensors files: which tensors one holds, and reading parts of them into memory that is there already.

A file is 8 bytes of little-endian length, a JSON header of that length, and the data that the header describes
(https://github.com/huggingface/safetensors#format). Whole rows are read by `preadv`, which copies from the page cache once.
Columns are copied out of a mapping of just the rows in question: reading whole rows would copy what other ranks want too, and
a system call for each row costs more than its bytes. Both let go of the interpreter, so threads read side by side; and nothing
stays mapped, since mapped pages count as this process's memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LENGTH_BYTES = 8
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # of the types that weights may have


class NotSafetensors(ValueError):
    """What is wrong with a file, as the end of a sentence."""


@dataclass(frozen=True)
class StoredTensor:
    """`dtype` as the format names it; `begin` and `end`: its bytes in the file. A matrix of shape[0] rows to `read`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        return (self.end - self.begin) // max(1, self.shape[0])


class SafetensorsFile:
    """An open file. Any number of threads may `read`.

    OSError: it cannot be opened. NotSafetensors: its header is not one, or describes more or fewer bytes than there are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.tensors = _parse(self._fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._fd)

    def read(self, tensor: StoredTensor, rows: slice, columns: slice, into: np.ndarray) -> None:
        """Rows of a tensor, of each the bytes `columns`, into uint8 [rows, bytes], which is contiguous.

        NotSafetensors: the file ends before; it was cut since it was opened.
        """
        begin, count = tensor.begin + rows.start * tensor.row_bytes, rows.stop - rows.start
        if columns == slice(0, tensor.row_bytes):
            self._read_range(begin, into.reshape(-1))
        else:
            self._copy_columns(begin, (count, tensor.row_bytes), columns, into)

    def _read_range(self, begin: int, into: np.ndarray) -> None:
        done = 0
        while done < into.size:
            count = os.preadv(self._fd, [into[done:].data], begin + done)
            if count == 0:
                raise NotSafetensors(f"it ends at byte {begin + done:,}, within a tensor")
            done += count

    def _copy_columns(self, begin: int, shape: tuple[int, int], columns: slice, into: np.ndarray) -> None:
        page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        end = begin + math.prod(shape)
        if os.fstat(self._fd).st_size < end:  # touching what is not there would end the process
            raise NotSafetensors(f"it ends before byte {end:,}, within a tensor")
        os.posix_fadvise(self._fd, page, end - page, os.POSIX_FADV_WILLNEED)  # what the page cache lacks comes in one go,
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # and all of it is mapped in one go, not a fault at a time
        with mmap.mmap(self._fd, end - page, flags, mmap.PROT_READ, offset=page) as mapped:
            whole = np.frombuffer(mapped, np.uint8, offset=begin - page).reshape(shape)
            np.copyto(into, whole[:, columns])
            del whole  # a mapping with a view of it cannot be closed


def _parse(fd: int) -> dict[str, StoredTensor]:
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, LENGTH_BYTES, 0), "little")
    data = LENGTH_BYTES + length
    if size < LENGTH_BYTES or data > size:
        raise NotSafetensors(f"its {size:,} bytes have no room for a header of {length:,}")
    try:
        header = json.loads(os.pread(fd, length, LENGTH_BYTES))
        tensors = {name: _stored(entry, data) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NotSafetensors("its header is not one") from None
    end = max((tensor.end for tensor in tensors.values()), default=data)
    if end != size:
        raise NotSafetensors(f"its header describes {end:,} bytes and there are {size:,}")
    return tensors


def _stored(entry: dict[str, Any], data: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), data + begin, data + end)
    item_bytes = ITEM_BYTES.get(tensor.dtype)
    if begin < 0 or end < begin or (item_bytes and end - begin != item_bytes * math.prod(tensor.shape)):
        raise ValueError
    return tensor
