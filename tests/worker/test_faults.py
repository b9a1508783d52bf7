"""Which errors say that every other try would end the same way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from batchinfer import hardware
from batchinfer.config import ConfigError, from_dict
from batchinfer.data.reader import InputChanged, InputUnreadable
from batchinfer.job.manifest import OtherWeights
from batchinfer.job.replica import FAILED, FULL, HOPELESS
from batchinfer.job.vitals import LastWord, Vitals
from batchinfer.worker.__main__ import choose_device
from batchinfer.worker.faults import exit_code

RUN = Path("/scratch/run")


def of_system(code: int, path: str | None = None) -> OSError:
    return OSError(code, os.strerror(code), path)


def unreadable(cause: Exception) -> InputUnreadable:
    error = InputUnreadable("rows 1 to 2 cannot be read")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("model.path=/m has no config.json"), HOPELESS),
        (OtherWeights("weight file a is not the one"), HOPELESS),
        (InputChanged("it changed"), HOPELESS),
        (of_system(errno.ENOSPC, f"{RUN}/completions/.000001.tmp"), FULL),
        (of_system(errno.EDQUOT, f"{RUN}/stats/.1.tmp"), FULL),
        (of_system(errno.ENOSPC, "/tmp/cache"), HOPELESS),  # of this node; what is true of the run's disk its job looks up
        (of_system(errno.ENOSPC), HOPELESS),
        (of_system(errno.EROFS, f"{RUN}/claims/.1.tmp"), HOPELESS),
        (PermissionError(errno.EACCES, "Permission denied", "/m/model.safetensors"), HOPELESS),
        (of_system(errno.EIO, "/m/model.safetensors"), FAILED),
        (of_system(errno.ESTALE, f"{RUN}/claims/1"), FAILED),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", f"{RUN}/claims/1"), FAILED),
        (unreadable(of_system(errno.EIO)), FAILED),
        (unreadable(OSError("Corrupt snappy compressed data")), HOPELESS),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), HOPELESS),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), HOPELESS),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), FAILED),
        (MemoryError(), FAILED),
        (ValueError("a mistake of ours"), FAILED),
    ],
)
def test_what_an_error_says_of_other_tries(error: Exception, code: int) -> None:
    assert exit_code(error, RUN) == code


def test_no_gpu_is_told_with_the_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sees no GPU below a driver that is too old, and says so in a warning only."""
    config = from_dict({"model": {"path": "m"}, "input": {"paths": ["in"], "prompt_column": "p"}, "hw": {"gpu": "a100-80gb"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(hardware, "driver_version", lambda: "470.82.01")
    with pytest.raises(ConfigError) as caught:
        choose_device(config)
    assert f"PyTorch {torch.__version__} for CUDA 13.0 sees no GPU on " in str(caught.value)
    assert "which has NVIDIA driver 470.82.01; choose nodes with a driver that is new enough" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="sees 1 GPU on"):
        choose_device(config)


def test_the_last_word_reaches_the_node_without_a_disk() -> None:
    vitals = Vitals.make()
    try:
        assert vitals.last_word() is None
        LastWord(FULL, "no space").leave({"BATCHINFER_VITALS": str(vitals.folder), "RANK": "1"})
        assert vitals.last_word() == LastWord(FULL, "no space")
        LastWord(HOPELESS, "nobody listens").leave({})
    finally:
        vitals.remove()
