"""Ceilings on a GPU: no more than the datasheet says, and not far less."""

from __future__ import annotations

import pytest
import torch

from batchinfer import compose, hardware
from batchinfer.bench import ceilings
from batchinfer.model.config import ModelShape
from batchinfer.model.parallel import TensorParallel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_ceilings_are_near_the_datasheet() -> None:
    facts = hardware.GPUS.get(hardware.visible_gpus()[0].gpu)
    if facts is None:
        pytest.skip("no datasheet of this GPU")
    shape = ModelShape.from_hf(compose.compose(["model=llama7b"], planning=True).model.architecture)
    found = ceilings.measure(shape, torch.bfloat16, TensorParallel(), torch.device("cuda"), ceilings.GPU)
    bandwidth, operations = facts.bandwidth_gb_s * 1e9, facts.tflops * 1e12
    assert 0.7 * bandwidth < found.read < bandwidth and 0.7 * bandwidth < found.copy < bandwidth
    assert 0.5 * operations < found.best_gemm < operations and 0.2 * operations < found.attention < operations
    rows, least = found.gemm[0]
    assert rows == 1 and 0.5 * bandwidth < least < bandwidth  # one row: two operations for the two bytes of a weight
