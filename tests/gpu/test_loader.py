"""Weights on a GPU are those of the checkpoint, however often the pinned buffers are used again while copies are under way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchinfer.config import ModelConfig
from batchinfer.model import loader
from batchinfer.model.config import load_shape
from batchinfer.model.decoder import Decoder
from batchinfer.model.parallel import TensorParallel
from tests.checkpoints import save_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
def test_every_slice_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, rank: int, size: int) -> None:
    """On the last GPU: threads that read begin with the first."""
    sizes = {"vocab_size": 4097, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    theirs = dict(save_checkpoint(tmp_path, dtype=stored, max_shard_size="5MB", **sizes).named_parameters())
    config, device = ModelConfig(path=str(tmp_path)), torch.device("cuda", torch.cuda.device_count() - 1)
    shape = load_shape(config)
    model = Decoder(shape, TensorParallel(rank, size), torch.bfloat16, device, 16)
    monkeypatch.setattr(loader, "PIECE_BYTES", 20_000)
    loader.load_weights(model, shape, config, 0, device)
    for wish in model.slices():
        part = theirs[wish.name].detach().narrow(wish.dim, wish.start, wish.stop - wish.start)
        assert torch.equal(wish.destination.cpu(), part.bfloat16()), wish.name
