"""Which config.json are read, how, and which are refused with which sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from batchinfer.config import ConfigError, ModelConfig
from batchinfer.model.config import Llama3Rope, ModelShape, load_shape, resolve_dtype
from tests.checkpoints import LLAMA, random_model, save_checkpoint

BASE = {**LLAMA, "architectures": ["LlamaForCausalLM"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_both_spellings_of_rope():
    old = ModelShape.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = ModelShape.from_hf({**BASE, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, Llama3Rope(8.0, 1.0, 4.0, 64))
    assert ModelShape.from_hf({**BASE, "rope_scaling": None}).rope_theta == 10_000


def test_sliding_window_is_mistrals_alone():
    mistral = {**LLAMA, "model_type": "mistral"}
    assert ModelShape.from_hf(mistral).sliding_window == 4096
    assert ModelShape.from_hf({**mistral, "sliding_window": None}).sliding_window is None
    assert ModelShape.from_hf({**mistral, "sliding_window": 9}).sliding_window == 9
    assert ModelShape.from_hf({**BASE, "sliding_window": 9}).sliding_window is None


def test_num_parameters_counts_what_transformers_counts():
    for changes in ({}, {"tie_word_embeddings": True}, {"head_dim": 6, "num_key_value_heads": 1}):
        shape = ModelShape.from_hf({**BASE, **changes})
        assert shape.num_parameters() == random_model(**changes).num_parameters()
        assert shape.weight_bytes("bfloat16") == 2 * shape.num_parameters()


def test_kv_heads_are_replicated_beyond_their_number():
    shape = ModelShape.from_hf(BASE)  # 4 heads, 2 KV heads of 8
    assert [shape.kv_bytes_per_token("float16", ranks) for ranks in (1, 2, 4)] == [128, 64, 64]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures=.*must be one of LlamaForCausalLM, MistralForCausalLM"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn' must be one of default, llama3"),
        ({"attention_bias": True}, "attention_bias=True must be false"),
        ({"mlp_bias": True}, "mlp_bias=True must be false"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config=.* must be null"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be silu"),
        ({"hidden_size": None}, "hidden_size=None must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must be a divisor"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
        ({"torch_dtype": "float8"}, "torch_dtype='float8' must be one of bfloat16"),
    ],
)
def test_refusals_name_the_field(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ModelShape.from_hf({**BASE, **changes})


def test_checkpoint_wins_over_architecture_and_generation_config_over_both(tmp_path):
    save_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    shape = load_shape(ModelConfig(path=str(tmp_path), architecture={**BASE, "hidden_size": 999}))
    assert (shape.hidden_size, shape.eos_token_ids, shape.dtype) == (32, (7, 9), "float64")
    (tmp_path / "generation_config.json").unlink()
    assert load_shape(ModelConfig(path=str(tmp_path))).eos_token_ids == (2,)
    assert load_shape(ModelConfig(architecture=BASE)).hidden_size == 32


def test_a_missing_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=f"model.path={tmp_path} has no config.json"):
        load_shape(ModelConfig(path=str(tmp_path), architecture=BASE))
    with pytest.raises(ConfigError, match=r"model\.path is null and model\.architecture is empty"):
        load_shape(ModelConfig())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_shape(ModelConfig(path=str(tmp_path)))


def test_auto_dtype():
    shape = ModelShape.from_hf({**BASE, "torch_dtype": "float16"})
    assert resolve_dtype("auto", shape, on_gpu=True) == "float16"
    assert resolve_dtype("auto", shape, on_gpu=False) == "float32"
    assert resolve_dtype("float64", shape, on_gpu=False) == "float64"


def test_reading_a_shape_imports_no_torch():
    code = "import sys, batchinfer.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
