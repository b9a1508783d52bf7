"""Our reader of safetensors against the library's, and headers that are not headers."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batchinfer.model.safetensors_file import NotSafetensors, SafetensorsFile


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Of odd sizes, so that nothing begins at a page; one is longer than several."""
    torch.manual_seed(0)
    made = {
        "bias": torch.randn(7).half(),
        "long": torch.randn(301, 257).bfloat16(),
        "wide": torch.randn(3, 9001),
        "none": torch.empty(0, 5),
        "double": torch.randn(5, 3, dtype=torch.float64),
    }
    save_file(made, tmp_path / "file", metadata={"format": "pt"})
    return made


def part(file: SafetensorsFile, name: str, rows: slice, columns: slice) -> np.ndarray:
    into = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=np.uint8)
    file.read(file.tensors[name], rows, columns, into)
    return into


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()


def test_all_tensors_are_found_with_type_and_shape(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = SafetensorsFile(tmp_path / "file")
    found = {name: (stored.dtype, stored.shape) for name, stored in file.tensors.items()}
    types = {"bias": "F16", "long": "BF16", "wide": "F32", "none": "F32", "double": "F64"}
    assert found == {name: (types[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
    file.close()


def test_any_rows_and_columns_are_the_bytes_of_the_tensor(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = SafetensorsFile(tmp_path / "file")
    rng = np.random.default_rng(0)

    def compare(name: str) -> None:
        whole = as_bytes(tensors[name])
        rows, columns = (slice(*sorted(rng.choice(size + 1, 2, replace=False).tolist())) for size in whole.shape)
        assert np.array_equal(part(file, name, rows, columns), whole[rows, columns])
        assert np.array_equal(part(file, name, rows, slice(0, whole.shape[1])), whole[rows])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compare, ["bias", "long", "wide", "double"] * 25))
    file.close()


def test_reads_end_with_the_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = SafetensorsFile(tmp_path / "file")
    os.truncate(tmp_path / "file", file.tensors["long"].end - 1)
    for columns in (slice(0, 514), slice(2, 514)):
        with pytest.raises(NotSafetensors, match="within a tensor"):
            part(file, "long", slice(0, 301), columns)
    file.close()


def whole(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "have no room for a header"),
        (b"1234567", "have no room for a header"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "10 bytes have no room for a header of 4,611,686,018,427,387,904"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "its header is not one"),
        (whole([]), "its header is not one"),
        (whole({"x": 1}), "its header is not one"),
        (whole({"x": {**ENTRY, "shape": [3]}}, bytes(8)), "its header is not one"),
        (whole({"x": {**ENTRY, "data_offsets": [-8, 0]}}), "its header is not one"),
        (whole({"x": {**ENTRY, "data_offsets": [8]}}, bytes(8)), "its header is not one"),
        (whole({"x": ENTRY}, bytes(7)), "its header describes 77 bytes and there are 76"),
        (whole({"x": ENTRY}, bytes(9)), "its header describes 77 bytes and there are 78"),
    ],
)
def test_what_is_no_safetensors_file_is_said(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "file").write_bytes(content)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotSafetensors, match=sentence):
        SafetensorsFile(tmp_path / "file")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_types_of_others_may_stand_in_the_header(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(whole({"x": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}, bytes(3)))
    assert SafetensorsFile(tmp_path / "file").tensors["x"].dtype == "F8_E4M3"
