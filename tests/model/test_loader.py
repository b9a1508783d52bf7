"""What a checkpoint may look like, and the sentence for what it may not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchinfer.config import ConfigError
from tests.checkpoints import save_checkpoint
from tests.model.oracle import load


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path)
    return tmp_path


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _logits(folder):
    return load(folder).step({0: [1, 2, 3]})[0]


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(NORM), f"lacks 1 tensors .*{NORM}"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), r"no place for: .*q_proj\.bias"),
        (lambda t: t.update({NORM: torch.ones(31)}), rf"{NORM} has shape \[31\], but config.json calls for \[32\]"),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), "has type I8: it must be one of BF16"),
    ],
)
def test_wrong_tensors_are_named(folder, change, sentence):
    _edit(folder, change)
    with pytest.raises(ConfigError, match=sentence):
        load(folder)


def test_rotary_buffers_and_a_tied_head_are_tolerated(tmp_path):
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = _logits(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(97, 32)}
    _edit(tmp_path, lambda tensors: tensors.update(extra))
    assert torch.equal(_logits(tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_checkpoints_are_cast_to_the_models_type(folder, dtype):
    _edit(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    narrow = _logits(folder)
    _edit(folder, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))
    assert torch.equal(_logits(folder), narrow)


def test_files_that_are_not_a_checkpoint(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is not a safetensors file, or it is cut short"):
        load(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ConfigError, match="is not an index of safetensors"):
        load(folder)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    save_checkpoint(tmp_path, max_shard_size="10KB")
    files = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(files) > 2
    (tmp_path / min(files)).unlink()
    with pytest.raises(ConfigError, match=r"\.safetensors is missing"):
        load(tmp_path)
