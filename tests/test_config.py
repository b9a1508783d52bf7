"""The schema refuses what it cannot keep, in one sentence that names the key, the value and what would be valid."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchinfer import config as c


def request(**changes: Any) -> dict[str, Any]:
    """A valid nested request with dotted keys (given with __ for the dot) changed."""
    raw: dict[str, Any] = {
        "model": {"load_format": "random", "architecture": {"hidden_size": 8}},
        "input": {"paths": ["a.parquet"], "prompt_column": "prompt"},
    }
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (raw.setdefault(group, {}) if group else raw)[key] = value
    return raw


def refusal(**changes: Any) -> str:
    with pytest.raises(c.ConfigError) as caught:
        c.from_dict(request(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_key_is_classed_and_explained() -> None:
    for name, f in c.leaves():
        assert f.metadata.get("kind") in (c.RESULT, c.SCHEMA, c.THROUGHPUT), name
        assert f.metadata.get("help"), name


def test_defaults_pass_their_own_checks() -> None:
    config = c.from_dict(request())
    flat, defaults = c.flatten(config), c.flatten(c.Config())
    assert [name for name in flat if flat[name] != defaults[name]] == [
        "model.load_format",
        "model.architecture",
        "input.paths",
        "input.prompt_column",
    ]


def test_plain_form_round_trips_through_json() -> None:
    config = c.from_dict(request(hw__env={"NCCL_DEBUG": "WARN", "N": 1}, sampling__stop=["\n"], output__keep_columns=["id"]))
    assert c.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_schema_is_kept_as_text_in_its_own_order() -> None:
    """Names are generated in the schema's order, so two orders are two requests."""
    for text in ('{"b": 1, "a": {"c": ["é"]}}', '{"a": {"c": ["é"]}, "b": 1}'):
        for given in (text, json.loads(text)):
            config = c.from_dict(request(sampling__json_schema=given))
            assert config.sampling.json_schema == text and c.from_dict(config.to_dict()) == config


def test_flatten_gives_every_leaf_in_order() -> None:
    assert list(c.flatten(c.from_dict(request()))) == [name for name, _ in c.leaves()]


def test_integers_become_floats_and_nothing_else_is_converted() -> None:
    value = c.from_dict(request(sampling__temperature=1)).sampling.temperature
    assert isinstance(value, float) and value == 1.0


def test_one_text_is_a_list_of_it() -> None:
    sampling = c.from_dict(request(sampling__choice="yes", sampling__stop="\n")).sampling
    assert (sampling.choice, sampling.stop) == (["yes"], ["\n"])
    assert c.from_dict(request(output__keep_columns="none")).output.keep_columns == "none"


def test_values_are_copied() -> None:
    raw = request()
    config = c.from_dict(raw)
    raw["input"]["paths"].append("b.parquet")
    assert config.input.paths == ["a.parquet"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sampling__temprature": 1},
            "sampling.temprature: no such key; did you mean sampling.temperature? keys of sampling: temp",
        ),
        ({"run_nam": "x"}, "run_nam: no such key; did you mean run_name? keys at the top: run_name, seed,"),
        ({"hw": "a100"}, "hw=a100: must be a group of keys: gpu,"),
        ({"sampling__top_p": 0}, "sampling.top_p=0.0: must be above 0 and at most 1"),
        ({"sampling__top_p": 1.5}, "sampling.top_p=1.5: must be above 0 and at most 1"),
        ({"sampling__max_tokens": 0}, "sampling.max_tokens=0: must be at least 1"),
        ({"sampling__max_tokens": True}, "sampling.max_tokens=true: must be an integer"),
        ({"sampling__max_tokens": 1.0}, "sampling.max_tokens=1.0: must be an integer"),
        ({"sampling__max_tokens": None}, "sampling.max_tokens=null: must be an integer"),
        ({"sampling__temperature": True}, "sampling.temperature=true: must be a number"),
        ({"sampling__temperature": float("nan")}, "sampling.temperature=nan: must be a finite number"),
        ({"sampling__temperature": float("inf")}, "sampling.temperature=inf: must be a finite number"),
        ({"sampling__temperature": "0.5"}, "sampling.temperature=0.5: must be a number, not text"),
        ({"sampling__stop": ["x", ""]}, 'sampling.stop=[x, ""]: a stop string must not be empty'),
        ({"sampling__json_schema": 5}, "sampling.json_schema=5: must be text, a group of names and values or null"),
        ({"sampling__ignore_eos": 1}, "sampling.ignore_eos=1: must be true or false"),
        ({"sampling__stop": 3}, "sampling.stop=3: must be a list of texts"),
        (
            {"sampling__stop": ["x", 3]},
            "sampling.stop=[x, 3]: must be a list of texts, [a,b]; quote numbers, true and false to make them text",
        ),
        ({"sampling__stop_token_ids": [1, "x"]}, "sampling.stop_token_ids=[1, x]: must be a list of integers, [1,2], not text"),
        ({"run_name": 12}, "run_name=12: must be text or null; quote numbers, true and false to make them text"),
        ({"run_name": "a/b"}, "run_name=a/b: must be letters"),
        ({"run_name": ".."}, "run_name=..: must be letters"),
        ({"model__dtype": "int8"}, "model.dtype=int8: must be one of auto, bfloat16,"),
        ({"model__architecture": {"x": float("inf")}}, "model.architecture.x=inf: must be a finite number"),
        ({"hw__interconnect": "ib"}, "hw.interconnect=ib: must be one of nvlink, pcie, null"),
        ({"hw__env": {1: "x"}}, "hw.env={1: x}: the name 1 must be text"),
        ({"sampling__n": 0}, "sampling.n=0: must be at least 1 and at most 16384"),
        ({"sampling__repetition_penalty": 0}, "sampling.repetition_penalty=0.0: must be above 0"),
        ({"sampling__presence_penalty": -2.5}, "sampling.presence_penalty=-2.5: must be at least -2 and at most 2"),
        ({"sampling__frequency_penalty": 3}, "sampling.frequency_penalty=3.0: must be at least -2 and at most 2"),
        ({"sampling__logprobs": -1}, "sampling.logprobs=-1: must be at least 0 and at most 128"),
        ({"sampling__prompt_logprobs": 1000}, "sampling.prompt_logprobs=1000: must be at least 0 and at most 128"),
        ({"sampling__regex": 3}, "sampling.regex=3: must be text or null; quote numbers, true and false to make them text"),
        ({"sampling__choice": [True]}, "sampling.choice=[true]: must be a list of texts, [a,b], or null; quote"),
        ({"sampling__json_schema": ["a"]}, "sampling.json_schema=[a]: must be text, a group of names and values or null"),
        ({"sampling__json_schema": {1: 2}}, "sampling.json_schema={1: 2}: the name 1 must be text"),
        (
            {"engine__attention_backend": "flash"},
            "engine.attention_backend=flash: must be one of auto, reference, fused_softmax",
        ),
        ({"output__keep_columns": "some"}, "output.keep_columns=some: must be all, none or a list of columns"),
    ],
)
def test_single_keys(changes: dict[str, Any], said: str) -> None:
    assert refusal(**changes).startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input__prompt_column": None}, "none of them is set: exactly one of input.prompt_column, input.messages_column,"),
        ({"input__messages_column": "m"}, "input.prompt_column=prompt and input.messages_column=m: exactly one of"),
        ({"input__paths": []}, "input.paths=[]: must name"),
        ({"input__system_prompt": "Be brief."}, "input.system_prompt=Be brief.: must go with input.messages_column or"),
        (
            {"input__prompt_column": None, "input__token_ids_column": "t", "input__apply_chat_template": True},
            "input.apply_chat_template=true: must go with input.prompt_column or input.prompt_template, not with",
        ),
        ({"sampling__min_tokens": 5, "sampling__max_tokens": 4}, "sampling.min_tokens=5: must be at most sampling.max_tokens=4"),
        ({"sampling__choice": []}, "sampling.choice=[]: must name at least one string"),
        (
            {"sampling__regex": "", "sampling__json_schema": "{}"},
            "sampling.json_schema and sampling.regex: at most one of them may be set",
        ),
        ({"model__load_format": "safetensors"}, "model.path=null: must name"),
        ({"model__architecture": {}}, "model.load_format=random: needs model.architecture or model.path"),
        ({"model__dtype": "float64", "hw__gpu": "A100-80GB"}, "model.dtype=float64: must run on a CPU"),
        ({"hw__tensor_parallel": 3, "hw__gpus_per_node": 4}, "hw.tensor_parallel=3: must be auto or divide hw.gpus_per_node=4"),
        ({"hw__nodes_per_replica": 2}, "launcher.nodes=1: must be a multiple of hw.nodes_per_replica=2"),
        (
            {"hw__nodes_per_replica": 2, "launcher__nodes": 2, "hw__gpus_per_node": 4, "hw__tensor_parallel": 4},
            "hw.tensor_parallel=4: must be auto or 8, all GPUs of the hw.nodes_per_replica=2 nodes",
        ),
        ({"hw__env": {"A": {"B": 3}}}, "hw.env.A={B: 3}: must be text or a number"),
        ({"hw__env": {"A": None}}, "hw.env.A=null: must be text or a number"),
        ({"hw__tensor_parallel": 0}, "hw.tensor_parallel=0: must be auto or divide"),
        ({"hw__tensor_parallel": "all"}, "hw.tensor_parallel=all: must be auto or an integer"),
        ({"hw__tensor_parallel": True}, "hw.tensor_parallel=true: must be an integer or text"),
    ],
)
def test_keys_that_depend_on_each_other(changes: dict[str, Any], said: str) -> None:
    assert refusal(**changes).startswith(said)


@pytest.mark.parametrize(
    "changes",
    [
        {"input__prompt_column": None, "input__messages_column": "m", "input__system_prompt": "s"},
        {"input__apply_chat_template": True, "input__system_prompt": "s"},
        {"input__prompt_column": None, "input__prompt_template": "{{ a }}", "input__apply_chat_template": True},
        {"hw__gpus_per_node": 8, "hw__tensor_parallel": 4},
        {"model__path": "/m", "model__load_format": "safetensors", "model__architecture": {}},
        {"model__dtype": "float64"},
        {"run_name": "a.b_c-1"},
    ],
)
def test_combinations_that_are_fine(changes: dict[str, Any]) -> None:
    c.from_dict(request(**changes))
