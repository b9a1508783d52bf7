from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from batchinfer.config import Config, ConfigError, from_dict
from batchinfer.data.reader import InputSet
from batchinfer.data.schema import RowRange, Shard
from batchinfer.job import manifest as module
from batchinfer.job.manifest import (
    TOKENIZER_FILES,
    Manifest,
    check_weights,
    checkpoint_digests,
    fingerprint_of,
    hash_weights,
    request_of,
)
from batchinfer.job.rundir import RunDir

SHARDS = (Shard("a.parquet", 1000, 100, "aa"), Shard("b/c.parquet", 10, 3, "bb"))
INPUTS = InputSet(Path("/data"), SHARDS, pa.schema([("id", pa.int64()), ("prompt", pa.string())]))
UNITS = ((RowRange(0, 0, 64),), (RowRange(0, 64, 100), RowRange(1, 0, 3)))


def config_of(**groups: Any) -> Config:
    model = {"path": "/nowhere"} | groups.pop("model", {})
    return from_dict({"model": model, "input": {"prompt_column": "prompt", "paths": ["/data"]}, **groups})


def create(run_dir: RunDir, config: Config) -> Manifest:
    return Manifest.create(run_dir, config, INPUTS, ["id"], UNITS, request_of(config, SHARDS, INPUTS.schema))


def save_weights(path: Path, tensor: str, data: bytes) -> None:
    header = json.dumps({tensor: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_weights(folder / "model-1.safetensors", "x", b"1234")
    save_weights(folder / "model-2.safetensors", "y", b"5678")
    (folder / "additional_chat_templates").mkdir()
    templates = ("chat_template.jinja", "additional_chat_templates/rag.jinja")
    for name in (*TOKENIZER_FILES, *templates, "config.json", "generation_config.json"):
        (folder / name).write_text(f"content of {name}")
    return folder


def test_what_is_loaded_is_what_was_created(run_dir: RunDir) -> None:
    config = config_of(sampling={"stop": ["é", "\n"], "temperature": 0.1}, seed=7)
    made = create(run_dir, config)
    assert Manifest.load(run_dir) == made
    assert (made.config, made.shards, made.units, made.columns, made.input_root) == (config, SHARDS, UNITS, ["id"], "/data")
    assert from_dict(yaml.safe_load(run_dir.config_yaml.read_text())) == config
    assert made.versions["python"] and made.versions["pyarrow"] == pa.__version__
    assert re.fullmatch(r"[0-9a-f]{64}", made.fingerprint)


def test_creating_again_returns_the_first_manifest(run_dir: RunDir) -> None:
    first = create(run_dir, config_of())
    assert create(run_dir, config_of(engine={"block_size": 32})) == first, "throughput keys are outside the fingerprint"


def test_another_request_is_refused_key_by_key(run_dir: RunDir) -> None:
    create(run_dir, config_of())
    with pytest.raises(ConfigError) as caught:
        create(run_dir, config_of(seed=3, sampling={"stop": ["x"]}, output={"prefix": "my_"}))
    message = str(caught.value)
    assert "seed was 0, now 3" in message and 'sampling.stop was [], now ["x"]' in message and '"my_"' in message
    assert "temperature" not in message and "\n" not in message
    assert from_dict(yaml.safe_load(run_dir.config_yaml.read_text())) == config_of()


def test_new_shards_or_columns_are_another_request() -> None:
    config = config_of()
    request = request_of(config, SHARDS, INPUTS.schema)
    assert request["input.shards"].startswith("2 shards, 103 rows, sha256 ")
    assert request_of(config, SHARDS[:1], INPUTS.schema)["input.shards"] != request["input.shards"]
    changed = (Shard("a.parquet", 1000, 100, "ab"), SHARDS[1])
    assert request_of(config, changed, INPUTS.schema)["input.shards"] != request["input.shards"]
    wider = INPUTS.schema.append(pa.field("extra", pa.float32()))
    assert fingerprint_of(request_of(config, SHARDS, wider)) != fingerprint_of(request)
    assert request_of(config, SHARDS, wider)["input.schema"][-1] == "extra: float"


def test_the_request_names_result_and_schema_keys_only(checkpoint: Path) -> None:
    request = request_of(config_of(model={"path": str(checkpoint)}), SHARDS, INPUTS.schema)
    assert {"seed", "sampling.temperature", "output.keep_columns", "model.dtype", "output.schema_version"} <= request.keys()
    assert not request.keys() & {"model.path", "input.paths", "hw.gpu", "engine.block_size", "output.dir"}
    assert request["model.weights_headers"] and request["model.tokenizer"]


def test_a_killed_creation_starts_over(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "publish_bytes", die)
        create(run_dir, config_of(seed=1))
    assert run_dir.config_yaml.exists()
    assert create(run_dir, config_of(seed=2)).config.seed == 2
    assert yaml.safe_load(run_dir.config_yaml.read_text())["seed"] == 2


def test_one_of_two_requests_at_once_wins_whole(run_dir: RunDir) -> None:
    def attempt(seed: int) -> int | None:
        try:
            return create(run_dir, config_of(seed=seed)).config.seed
        except ConfigError:
            return None

    with ThreadPoolExecutor(4) as pool:
        seeds = list(pool.map(attempt, [0, 1, 0, 1]))
    winner = Manifest.load(run_dir).config.seed
    assert set(seeds) == {winner, None} and seeds.count(winner) == 2


def test_there_is_no_run_without_a_manifest(tmp_path: Path, run_dir: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"nowhere has no manifest\.json"):
        Manifest.load(RunDir(tmp_path / "nowhere"))
    create(run_dir, config_of())
    raw = json.loads(run_dir.manifest_json.read_bytes()) | {"schema_version": 99, "git_commit": "0123456789abcdef"}
    run_dir.manifest_json.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"schema version 99, .* that made it \(commit 0123456789ab\)$"):
        Manifest.load(run_dir)


def test_a_million_rows_are_small_and_load_fast(run_dir: RunDir) -> None:
    units = tuple((RowRange(i // 10, i % 10 * 1000, i % 10 * 1000 + 1000),) for i in range(1000))
    shards = tuple(Shard(f"part-{i:05d}.parquet", 10**8, 10_000, "f" * 64) for i in range(100))
    config = config_of()
    request = request_of(config, shards, INPUTS.schema)
    Manifest.create(run_dir, config, InputSet(Path("/data"), shards, INPUTS.schema), [], units, request)
    assert run_dir.manifest_json.stat().st_size < 100_000
    started = time.perf_counter()
    assert Manifest.load(run_dir).units == units
    assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize(
    "name, key",
    [
        ("tokenizer.json", "model.tokenizer"),
        ("tokenizer_config.json", "model.tokenizer"),
        ("special_tokens_map.json", "model.tokenizer"),
        ("added_tokens.json", "model.tokenizer"),
        ("chat_template.jinja", "model.chat_template_file"),
        ("additional_chat_templates/rag.jinja", "model.chat_template_file"),
        ("config.json", "model.config_json"),
        ("generation_config.json", "model.config_json"),
        ("model-2.safetensors", "model.weights_headers"),
    ],
)
def test_each_file_of_a_checkpoint_changes_its_own_digest(checkpoint: Path, name: str, key: str) -> None:
    before = checkpoint_digests(checkpoint)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes() + b" ")
    after = checkpoint_digests(checkpoint)
    assert {k for k in before if before[k] != after[k]} == {key}


def test_headers_alone_are_read_when_planning(checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint_digests(checkpoint)
    save_weights(checkpoint / "model-1.safetensors", "x", b"4321")
    assert checkpoint_digests(checkpoint) == before
    save_weights(checkpoint / "model-1.safetensors", "z", b"1234")
    assert checkpoint_digests(checkpoint) != before
    assert set(checkpoint_digests(None).values()) == set(checkpoint_digests(tmp_path / "absent").values()) == {None}


def test_a_template_file_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    by_file = request_of(config_of(model={"chat_template": str(tmp_path / "t.jinja")}), SHARDS, INPUTS.schema)
    by_text = request_of(config_of(model={"chat_template": "{{ messages }}"}), SHARDS, INPUTS.schema)
    assert by_file == by_text


def test_weights_are_recorded_once_and_compared(run_dir: RunDir, checkpoint: Path) -> None:
    run_dir.create()
    hashes = hash_weights(checkpoint)
    expected = subprocess.run(["sha256sum", str(checkpoint / "model-1.safetensors")], capture_output=True, text=True, check=True)
    assert list(hashes) == ["model-1.safetensors", "model-2.safetensors"]
    assert hashes["model-1.safetensors"] == expected.stdout.split()[0]
    check_weights(run_dir, hashes)
    check_weights(run_dir, hashes)
    save_weights(checkpoint / "model-2.safetensors", "y", b"5679")
    with pytest.raises(RuntimeError, match=r"model-2\.safetensors is not the one"):
        check_weights(run_dir, hash_weights(checkpoint))
    os.unlink(checkpoint / "model-2.safetensors")
    with pytest.raises(RuntimeError, match="now absent"):
        check_weights(run_dir, hash_weights(checkpoint))


def test_the_control_plane_stays_without_torch() -> None:
    code = "import sys, batchinfer.job.manifest, batchinfer.job.claims, batchinfer.job.rundir; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
