"""Every YAML composes, every mistake is one sentence, and a request has a stable name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer import compose as c
from batchinfer.config import Config, ConfigError
from batchinfer.hardware import GPUS

# What a group's files need beside themselves to make a complete request.
NEEDS = {"parquet": ["input.paths=[x]", "input.prompt_column=text"]}
CHOICES = [(group, name) for group, names in c.group_choices().items() for name in names]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        c.compose(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_composes(group: str, choice: str) -> None:
    config = c.compose([f"{group}={choice}", *(NEEDS.get(choice, []) if group == "input" else [])], planning=True)
    assert isinstance(config, Config)


def test_no_yaml_is_left_unopened() -> None:
    opened = ["config.yaml", *(f"{group}/{choice}.yaml" for group, choice in CHOICES)]
    assert sorted(opened) == sorted(str(file.relative_to(c.conf_dir())) for file in c.conf_dir().rglob("*.yaml"))


def test_bare_command_is_the_shipped_model_over_the_shipped_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = c.compose([])
    assert config.model.path == str(c.PACKAGE / "tiny" / "model")
    assert config.input.paths == [str(c.PACKAGE / "tiny" / "sample")]
    assert config.hw.gpu == "auto" and config.launcher.kind == "auto"
    assert config.output.dir == f"outputs/{config.run_name}"
    assert list(tmp_path.iterdir()) == []  # Hydra makes no folder


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("hw=a100x3", "hw=a100x3: no such choice; did you mean hw=a100x8? choices of hw: a100x4, a100x8, auto, cpu,"),
        ("hw=null", "hw=null: no such choice; choices of hw:"),
        ("hw={gpu: a}", "hw={gpu: a}: no such choice;"),
        ("samplng.n=1", "samplng.n: no such key; did you mean sampling? keys at the top: run_name, seed,"),
        ("sampling.top_q=1", "sampling.top_q: no such key; did you mean sampling.top_p? keys of sampling: temperature,"),
        ("+sampling.best_of=1", "sampling.best_of: no such key; keys of sampling:"),
        ("sampling.top_p=0.1,0.2", "sampling.top_p=0.1,0.2: several values need --multirun"),
        ("model.path=a b=c", "model.path=a b=c: must be key=value or group=choice; quote"),
        ("~hw", "~hw: must be key=value or group=choice; nothing can be deleted"),
        ("hw@x=cpu", "hw@x=cpu: must be key=value"),
        ("hydra.run.dir=x", "hydra.run.dir=x: must be key=value"),
        ("seed=${nope}", "seed=${nope}: Interpolation key 'nope' not found"),
        ("run_name=7", "run_name=7: must be text or null; quote"),
        ("hw.tensor_parallel=3", "hw.tensor_parallel=3: must be auto or divide hw.gpus_per_node="),
        ("hw.env=3", "hw.env=3: must be a group of names"),
        ("hw.env=null", "hw.env=null: must be a group of names"),
    ],
)
def test_mistakes_are_sentences(override: str, said: str) -> None:
    assert refusal(override).startswith(said)


def test_keys_of_free_names_take_new_entries() -> None:
    config = c.compose(["hw=rtx4090x2", "hw.env.NCCL_DEBUG=INFO", "model.architecture={hidden_size: 8}", "launcher.extra.mail=x"])
    assert config.hw.env == {"NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "INFO"}
    assert config.model.architecture == {"hidden_size": 8} and config.launcher.extra == {"mail": "x"}


TIERS = [name for name in c.group_choices()["hw"] if name not in ("auto", "cpu")]


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_says_what_the_node_is_and_what_to_ask_for(tier: str) -> None:
    hw = c.compose([f"hw={tier}"]).hw
    assert hw.gpu in GPUS and tier.endswith(f"x{hw.gpus_per_node}")
    assert hw.cpus_per_gpu and hw.mem_gb and hw.modules == []
    assert hw.interconnect == (None if hw.gpus_per_node == 1 else "pcie" if hw.gpu == "rtx4090" else "nvlink")
    assert hw.env.get("NCCL_P2P_DISABLE") == ("1" if hw.interconnect == "pcie" else None)
    assert hw.env.get("NCCL_NVLS_ENABLE") == ("0" if hw.gpu in ("h100", "h200") and hw.interconnect else None)


def test_no_tier_forces_a_link_or_names_an_interface() -> None:
    for choice in c.group_choices()["hw"]:
        for name in c.compose([f"hw={choice}"]).hw.env:
            assert name != "NCCL_P2P_LEVEL" and not name.startswith("NCCL_IB") and not name.endswith("SOCKET_IFNAME")


def test_planning_needs_no_checkpoint() -> None:
    assert refusal("model=llama7b").startswith("model.path=null: must name a checkpoint folder")
    assert c.compose(["model=llama7b"], planning=True).model.architecture["hidden_size"] == 4096


def test_default_name_follows_the_request_and_nothing_else() -> None:
    name = c.compose([]).run_name
    assert name is not None and name.startswith("tiny-") and len(name) == len("tiny-") + 8
    assert c.compose(["hw=a100x4", "engine.block_size=32", "launcher=slurm"]).run_name == name
    assert c.compose(["seed=1"]).run_name != name
    assert c.compose(["output.token_ids=true"]).run_name != name
    assert c.compose(["run_name=mine"]).output.dir == "outputs/mine"
    assert c.compose(["output.dir=/d"]).output.dir == "/d"


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = c.compose(["input.paths=[a/*.parquet,/b]", "model.path=m"])
    assert config.input.paths == [f"{tmp_path}/a/*.parquet", "/b"] and config.model.path == f"{tmp_path}/m"


def test_multirun_gives_every_combination_a_name() -> None:
    runs = c.expand_multirun(["sampling.temperature=0,1", "seed=range(0,3)", "run_name=x"])
    configs = [c.compose(run) for run in runs]
    assert [(config.sampling.temperature, config.seed) for config in configs] == [(t, s) for t in (0.0, 1.0) for s in (0, 1, 2)]
    assert [config.run_name for config in configs] == [f"x_{i}" for i in range(6)]


def test_multirun_keeps_names_that_differ_already() -> None:
    names = [c.compose(run).run_name for run in c.expand_multirun(["seed=choice(1,2)"])]
    assert len(set(names)) == 2 and not any("_" in str(name) for name in names)


def test_multirun_over_what_is_no_part_of_the_name() -> None:
    names = [str(c.compose(run).run_name) for run in c.expand_multirun(["engine.max_num_seqs=1,2"])]
    assert [name[-2:] for name in names] == ["_0", "_1"]


def test_multirun_refuses_one_folder_for_all() -> None:
    with pytest.raises(ConfigError, match=r"output.dir=d: each combination of --multirun needs its own folder"):
        c.expand_multirun(["seed=1,2", "output.dir=d"])


def test_overlay_replaces_groups_and_single_keys() -> None:
    frozen = c.compose(["seed=5", "hw.env.A=1", "engine.max_num_seqs=8", "model.dtype=float32"])
    new = c.overlay(frozen, ["hw=a100x4", "hw.env.B=2", "engine.block_size=32"], ("hw", "engine"))
    assert new.hw.gpu == "a100-80gb" and new.hw.env == {"NCCL_DEBUG": "WARN", "B": 2}
    assert (new.engine.block_size, new.engine.max_num_seqs, new.seed, new.model.dtype) == (32, 8, 5, "float32")
    assert c.overlay(frozen, ["hw.env.B=2"], ("hw",)).hw.env == {"A": 1, "B": 2}
    assert c.overlay(frozen, [], ()) == frozen


@pytest.mark.parametrize("override", ["seed=2", "sampling=default", "sampling.n=1", "input.rows_per_unit=5", "run_name=y"])
def test_overlay_refuses_what_makes_another_run(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{override}: cannot change when a run is resumed; what may: hw, model.path$"):
        c.overlay(c.compose([]), [override], ("hw", "model.path"))


def test_model_shapes_are_the_published_ones() -> None:
    from batchinfer.model.config import ModelShape

    billions = {
        "llama7b": 6.738,
        "llama13b": 13.016,
        "llama70b": 68.977,
        "llama3_1b": 1.236,
        "llama3_3b": 3.213,
        "llama3_8b": 8.030,
        "llama3_70b": 70.554,
        "mistral7b": 7.242,
        "mistral7b_v3": 7.248,
        "qwen2_7b": 7.616,
        "qwen3_8b": 8.191,
    }
    assert {*billions, "tiny"} == {file.stem for file in (c.conf_dir() / "model").glob("*.yaml")}
    for name, size in billions.items():
        shape = ModelShape.from_hf(c.compose([f"model={name}"], planning=True).model.architecture)
        assert round(shape.num_parameters() / 1e9, 3) == size
        assert (shape.sliding_window == 4096) == (name == "mistral7b")
        assert (shape.rope_scaling is not None) == name.startswith("llama3_")


def test_frozen_form_is_plain_json() -> None:
    config = c.compose(["hw=a100x4"])
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_a_schema_is_a_mapping_json_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = json.dumps({"type": "string", "pattern": '^it\'s "a"\\d$'})
    Path("schema.json").write_text(text)
    for given in (text, "schema.json", str(tmp_path / "schema.json")):
        assert c.compose([f"sampling.json_schema={given}"]).sampling.json_schema == text
    assert c.compose(["sampling.json_schema={type: string}"]).sampling.json_schema == '{"type": "string"}'
    assert refusal("sampling.json_schema=nope.json") == (
        "sampling.json_schema=nope.json: neither a mapping nor JSON text, nor a file that can be read"
    )
    assert refusal('sampling.json_schema={"type": }').startswith('sampling.json_schema={"type": }: must be key=value')
