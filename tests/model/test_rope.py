"""The rotary table against transformers' own functions, which compute in float32; and which settings are read how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from batchinfer.config import ConfigError
from batchinfer.model.config import ModelShape
from batchinfer.model.rope import rotary_table
from batchinfer.model.rope_config import DynamicRope, LinearRope, Llama3Rope, YarnRope
from tests.checkpoints import LLAMA

BASE = {**LLAMA, "architectures": ["LlamaForCausalLM"], "head_dim": 64, "max_position_embeddings": 4096}
LINEAR = {"rope_type": "linear", "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn of the model's length": {"rope_type": "yarn", "factor": 1.5},
    "yarn that shrinks": YARN | {"factor": 0.5},
    "attention_factor": YARN | {"attention_factor": 1.7},
    "betas": YARN | {"beta_fast": 20, "beta_slow": 2},
    "not truncated": YARN | {"truncate": False},
    "mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "mscale alone": YARN | {"mscale": 0.7},
    "a ramp without width": YARN | {"beta_fast": 1, "beta_slow": 1, "truncate": False},
    "a ramp beyond the last pair": YARN | {"beta_slow": 1e-7},
}


def shape_of(rope: dict[str, Any], **changes: Any) -> ModelShape:
    return ModelShape.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": rope, **changes})


def frequencies_and_factor(shape: ModelShape, position: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_table(shape, position + 1, torch.float64, torch.device("cpu"))[position].chunk(2)
    return torch.atan2(sin, cos), torch.hypot(cos, sin)


@pytest.mark.parametrize("name", SETTINGS)
def test_table_is_that_of_transformers(name):
    rope = SETTINGS[name]
    theirs = LlamaConfig(**{**BASE, "rope_parameters": {**rope, "rope_theta": 5e5}})
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, torch.device("cpu"))
    frequencies, factor = frequencies_and_factor(shape_of(rope))
    torch.testing.assert_close(frequencies, expected.double(), rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(factor, torch.full_like(factor, attention_factor), rtol=1e-12, atol=0)


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 9000])
def test_dynamic_rows_are_those_of_a_sequence_that_ends_there(length):
    theirs = LlamaConfig(**{**BASE, "rope_parameters": {**DYNAMIC, "rope_theta": 5e5}})
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, torch.device("cpu"), seq_len=length)
    table = rotary_table(shape_of(DYNAMIC), length, torch.float64, torch.device("cpu"))
    angles = (length - 1) * frequencies.double()
    torch.testing.assert_close(table[-1], torch.cat((angles.cos(), angles.sin())), rtol=0, atol=3e-3)
    longer = rotary_table(shape_of(DYNAMIC), 9001, torch.float64, torch.device("cpu"))
    assert torch.equal(longer[:length], table)  # rows know nothing of max_model_len


@pytest.mark.parametrize("rope", [*SETTINGS.values(), DYNAMIC], ids=[*SETTINGS, "dynamic"])
def test_all_spellings_are_one_shape(rope):
    shape = shape_of(rope)
    assert shape.rope_scaling is not None and shape.rope_theta == 5e5
    inside = {**rope, "rope_theta": 5e5}
    assert shape_of({}, rope_theta=None, rope_scaling=None, rope_parameters=inside) == shape
    assert shape_of({}, rope_theta=7.0, rope_scaling=inside) == shape
    older = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    assert shape_of(older) == shape_of({**older, "rope_type": rope["rope_type"], "finetuned": True}) == shape
    saved = LlamaConfig(**{**BASE, "rope_scaling": dict(rope), "rope_theta": 5e5}).to_dict()
    assert ModelShape.from_hf({**saved, "architectures": ["LlamaForCausalLM"]}) == shape


def test_settings_by_value():
    assert shape_of(LINEAR).rope_scaling == LinearRope(3.0)
    assert shape_of(DYNAMIC).rope_scaling == DynamicRope(3.0, 4096)
    assert shape_of(LLAMA3).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 512)
    assert shape_of(YARN | {"attention_factor": 1.5}).rope_scaling == YarnRope(4.0, 1024, 1.5)
    assert shape_of(YARN, original_max_position_embeddings=2048).rope_scaling.original_max_position_embeddings == 2048
    assert shape_of({"rope_type": "default"}) == shape_of({}) == shape_of({}, rope_scaling=None)
    assert ModelShape.from_hf(BASE).rope_theta == 10_000


def test_longest_sequence_that_has_positions():
    lengths = {"linear": LINEAR, "dynamic": DYNAMIC, "llama3": LLAMA3, "yarn": YARN | {"factor": 16.0}, "short": YARN}
    found = {name: shape_of(rope).max_sequence_length for name, rope in lengths.items()}
    assert found == {"linear": 12288, "dynamic": 12288, "llama3": 4096, "yarn": 16384, "short": 4096}
    assert shape_of({}).max_sequence_length == 4096


@pytest.mark.parametrize(
    ("rope", "changes", "sentence"),
    [
        ({"rope_type": "longrope"}, {}, "rope_type='longrope' must be one of default, linear, dynamic, llama3, yarn$"),
        ({"type": "su"}, {}, "rope_type='su' must be one of"),
        ({"rope_type": "linear"}, {}, "rope_scaling: factor=None must be a number above 0"),
        (LINEAR | {"factor": "2"}, {}, "factor='2' must be a number above 0"),
        (YARN | {"beta_fast": -1}, {}, "beta_fast=-1 must be a number above 0"),
        (YARN | {"truncate": 1}, {}, "truncate=1 must be true or false"),
        (LLAMA3 | {"high_freq_factor": 1.0}, {}, "high_freq_factor=1.0 must be above low_freq_factor=1.0"),
        (LINEAR | {"beta_fast": 2}, {}, "beta_fast=2 must be absent: rope_type='linear' has factor$"),
        ({"mrope_section": [1, 2]}, {}, r"mrope_section=\[1, 2\] must be absent: rope_type='default' has no settings"),
        ({"full_attention": LINEAR}, {}, "full_attention=.* must be absent"),
        (LINEAR | {"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor=0.5 must be 1 or absent"),
        ({}, {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 must be 1 or absent"),
        ({}, {"rope_theta": 1}, "model.architecture: rope_theta=1 must be above 1"),
        (LINEAR | {"rope_theta": 0.5}, {}, "rope_scaling: rope_theta=0.5 must be above 1"),
        (DYNAMIC, {"head_dim": 2}, "rope_type='dynamic' needs a head_dim of at least 4, and it is 2"),
        (LINEAR, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters and rope_scaling differ: give one of them"),
        ([1], {}, r"rope_scaling=\[1\] must be an object or null"),
    ],
)
def test_refusals(rope, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        shape_of(rope, **changes)
