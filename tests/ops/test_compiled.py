"""The compiled kernels: they load without a GPU, and what is said when they are missing or do not fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from batchinfer import ops
from batchinfer.config import ConfigError
from batchinfer.ops import compiled

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(
    name for path in (ROOT / "csrc").glob("*_binding.cpp") for name in re.findall(r'm\.def\(\s*"(\w+)\(', path.read_text())
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    compiled.load_kernels.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, so nothing was built")
def test_every_op_is_in_the_library_and_loads_into_a_cpu_build() -> None:
    compiled.load_kernels()
    assert len(OPS) >= 12
    for name in OPS:
        assert hasattr(torch.ops.batchinfer, name), name


def test_missing_kernels_are_an_error_on_a_gpu_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "PATH", tmp_path / "_kernels.so")
    with pytest.raises(ConfigError, match=r"not built .*--no-build-isolation.* engine.attention_backend=reference"):
        ops.choose_backend("auto", torch.device("cuda"))
    ops.choose_backend("reference", torch.device("cuda"))
    ops.choose_backend("auto", torch.device("cpu"))


def test_a_file_that_is_no_library_is_an_error_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    monkeypatch.setattr(compiled, "PATH", tmp_path / "_kernels.so")
    with pytest.raises(ConfigError, match="do not load into PyTorch"):
        compiled.load_kernels()


def test_what_runs_on_a_cpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PATH", Path("/nowhere"))
    x = torch.randn(3, 8)
    assert torch.equal(ops.silu_and_mul(x), ops.reference.silu_and_mul(x))
