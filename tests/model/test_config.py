"""Which config.json are read, how, and which are refused with which sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers

from batchinfer.config import ConfigError, ModelConfig
from batchinfer.model.config import ModelShape, load_shape, resolve_dtype
from tests.checkpoints import LLAMA, save_checkpoint
from tests.model.variants import VARIANTS

BASE = {**LLAMA, "architectures": ["LlamaForCausalLM"]}
MISTRAL = {**LLAMA, "model_type": "mistral"}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
FULL, SLIDING = "full_attention", "sliding_attention"


def windows(config):
    shape = ModelShape.from_hf(config)
    return [shape.window_of(layer) for layer in range(shape.num_layers)]


def test_sliding_windows_by_layer():
    assert windows(MISTRAL) == [4096, 4096]
    assert windows({**MISTRAL, "sliding_window": None}) == [None, None]
    assert windows({**MISTRAL, "sliding_window": 9}) == [9, 9]
    assert windows({**BASE, "sliding_window": 9}) == [None, None]  # Llama has none
    for qwen in (QWEN2, QWEN3):
        used = {**qwen, "use_sliding_window": True, "sliding_window": 9}
        assert windows({**qwen, "sliding_window": 9, "max_window_layers": 0}) == [None, None]
        assert windows(used) == [None, None]  # max_window_layers is 28 where it is absent
        assert windows({**used, "sliding_window": None, "max_window_layers": 0}) == [None, None]
        assert windows({**used, "max_window_layers": 0}) == [9, 9]
        assert windows({**used, "max_window_layers": 1}) == [None, 9]
        assert windows({**used, "layer_types": [SLIDING, FULL], "max_window_layers": 1}) == [9, None]
        assert ModelShape.from_hf({**used, "layer_types": [FULL, FULL]}) == ModelShape.from_hf(qwen)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_absent_keys_mean_what_they_mean_to_transformers(family):
    sizes = {"vocab_size": 9, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 32}
    whole = getattr(transformers, f"{family}Config")(**sizes).to_dict()
    assert len(whole) > 20
    architectures = {"architectures": [f"{family}ForCausalLM"]}
    assert ModelShape.from_hf({**sizes, **architectures}) == ModelShape.from_hf({**whole, **architectures})


def test_num_parameters_counts_what_transformers_counts(tmp_path):
    for i, changes in enumerate(VARIANTS.values()):
        theirs = save_checkpoint(tmp_path / str(i), **changes)
        shape = load_shape(ModelConfig(path=str(tmp_path / str(i))))
        assert shape.num_parameters() == theirs.num_parameters()
        assert shape.weight_bytes("bfloat16") == 2 * shape.num_parameters()


def test_kv_heads_are_replicated_beyond_their_number():
    shape = ModelShape.from_hf(BASE)  # 4 heads, 2 KV heads of 8
    assert [shape.kv_bytes_per_token("float16", ranks) for ranks in (1, 2, 4)] == [128, 64, 64]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architectures=.*must be one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, llama, mis",
        ),
        ({"architectures": None, "model_type": "qwen2_moe"}, "model_type='qwen2_moe' must be one of LlamaForCausalLM"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias=True must be false or absent: MistralForCausalLM has no such"),
        ({**QWEN2, "mlp_bias": True}, "mlp_bias=True must be false or absent: Qwen2ForCausalLM has no such biases"),
        ({**QWEN3, "mlp_bias": True}, "mlp_bias=True must be false or absent: Qwen3ForCausalLM has no such biases"),
        (
            {"layer_types": [FULL, SLIDING]},
            "layer_types=.* must be absent: LlamaForCausalLM has the same attention in every layer",
        ),
        ({**MISTRAL, "layer_types": [FULL, SLIDING]}, "layer_types=.* must be absent: MistralForCausalLM has the same"),
        ({**QWEN2, "layer_types": [FULL]}, "layer_types=.* must be a list of num_hidden_layers=2 times full_attention or slid"),
        ({**QWEN2, "layer_types": [FULL, "chunked"]}, "layer_types=.*chunked.* must be a list of num_hidden_layers=2"),
        ({**QWEN2, "layer_types": [FULL, SLIDING]}, "layer_types=.* must be without sliding_attention where no sliding_window"),
        (
            {**QWEN2, "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers=-1 must be a whole number of at least 0",
        ),
        ({"attention_bias": 1}, "attention_bias=1 must be true or false"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config=.* must be null"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config=.* must be null: layers of different shapes"),
        ({"is_causal": False}, "is_causal=False must be true or absent"),
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
        ModelShape.from_hf({**BASE, "architectures": None if "model_type" in changes else BASE["architectures"], **changes})


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
