"""Finds and loads the compiled kernels, `batchinfer/_kernels.so`, as `torch.ops.batchinfer`. `setup.py` builds them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from batchinfer.config import ConfigError

PATH = Path(__file__).resolve().parents[1] / "_kernels.so"
BUILD = "pip install --no-build-isolation ."


@cache
def load_kernels() -> None:
    """Make `torch.ops.batchinfer` usable. ConfigError: the file is missing or does not fit this PyTorch."""
    if not PATH.exists():
        raise ConfigError(
            f"the CUDA kernels are not built ({PATH} is missing): build them with `{BUILD}` where nvcc is, or choose "
            "engine.attention_backend=reference for plain PyTorch"
        )
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        raise ConfigError(
            f"the CUDA kernels in {PATH} do not load into PyTorch {torch.__version__}: build them again with `{BUILD}`, or "
            f"choose engine.attention_backend=reference ({error})"
        ) from None
