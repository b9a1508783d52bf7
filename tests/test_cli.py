"""Verbs, exit codes, and the spine from overrides to a frozen run. The jobs themselves are tested where they are placed."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import yaml

from batchinfer.cli import main
from batchinfer.config import Config
from batchinfer.job.manifest import Manifest
from batchinfer.job.rundir import RunDir

CHECKOUT = Path(__file__).resolve().parents[1]
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
}


def words_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    (folder / "tokenizer_config.json").write_text("{}")
    words_tokenizer(300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def request_words(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a small valid request; the working directory is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    rows = pa.table({"id": range(40), "text": ["w1 w2 w3"] * 40})
    (tmp_path / "in").mkdir()
    pq.write_table(rows, tmp_path / "in" / "a.parquet")
    pq.write_table(rows, tmp_path / "in" / "b.parquet")
    return [
        "input=parquet",
        "input.paths=[in]",
        "input.prompt_column=text",
        f"model.path={checkpoint}",
        "hw=cpu",
        "model.load_format=random",
        "run_name=r",
        "input.rows_per_unit=16",
    ]


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Config]]:
    """What reaches the launcher, which is a stand-in that places nothing and succeeds."""
    calls: list[tuple[Path, Config]] = []
    launch = types.ModuleType("batchinfer.job.launch")

    def run_job(run_dir: RunDir, config: Config, expected: dict[str, Any] | None) -> int:
        assert (expected is None) == (config.hw.gpu is None), "predictions are of GPUs"
        calls.append((run_dir.root, config))
        return 0

    launch.__dict__.update(
        run_job=run_job, resolve_kind=lambda _: "local", check_placeable=lambda *_: None, cancel_jobs=lambda run_dir: None
    )
    monkeypatch.setitem(sys.modules, "batchinfer.job.launch", launch)
    return calls


Refusal = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs the command line, which must exit with 2 and say one line on stderr; returns it."""

    def run(*words: str) -> str:
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("batchinfer: ")
        return lines[0].removeprefix("batchinfer: ")

    return run


def test_wrong_words(refused: Refusal, tmp_path: Path) -> None:
    assert refused("statsu", "x").startswith("statsu: neither a verb nor key=value; did you mean status? verbs: run, resume,")
    assert refused("status", "--watch").startswith("status: RUN_DIR is missing; usage: python -m batchinfer status RUN_DIR")
    assert refused("status", "nowhere").startswith("nowhere: not a run directory: it must hold a manifest.json")
    assert refused("verify", str(tmp_path)).endswith("as outputs/<run_name> does")
    assert refused("resume", "hw=cpu").startswith("resume: RUN_DIR is missing")
    assert refused("--fog").startswith("--fog: no such flag here; flags: --multirun, -m, --cfg,")
    assert refused("plan", "--watch").startswith("--watch: no such flag here")
    assert refused("hw=cpux").startswith("hw=cpux: no such choice; did you mean hw=cpu?")
    assert refused("--cfg", "job", "hw=cpux").startswith("hw=cpux: no such choice")
    assert refused("--cfg", "jbo") == "--cfg jbo: must be --cfg and one of job, hydra, all"
    assert refused("--info=foo").startswith("--info foo: must be --info and one of all, config,")
    assert refused("+seed=1") == "+seed=1: every key exists already; leave out the +"
    assert refused("=3") == "=3: must be key=value or group=choice"
    assert refused("seed=1,2").startswith("seed=1,2: several values need --multirun")


def test_what_cannot_be_placed_leaves_no_run(request_words: list[str], refused: Refusal) -> None:
    assert "must be 1" in refused(*request_words, "launcher=inline", "launcher.nodes=2")
    assert not Path("outputs").exists()


def test_retry_and_export_of_a_run_without_rows(
    request_words: list[str], placed: list[tuple[Path, Config]], refused: Refusal
) -> None:
    assert main(request_words) == 0
    missing = "/outputs/r: rows are missing; finish them first: python -m batchinfer resume "
    assert missing in refused("retry", "outputs/r", "launcher.nodes=2")
    assert refused("retry", "outputs/r", "seed=1").startswith("seed=1: cannot change when a run is resumed; what may: hw,")
    assert refused("retry", "hw=cpu").startswith(
        "retry: RUN_DIR is missing; usage: python -m batchinfer retry RUN_DIR [retry.codes="
    )
    assert refused("export", "outputs/r").startswith("export: DEST is missing; usage: python -m batchinfer export RUN_DIR DEST")
    assert "no row is committed, so there is nothing to export" in refused("export", "outputs/r", "dest")
    assert refused("export", "outputs/r", "dest", "hw=cpu").startswith("hw=cpu: cannot change")
    assert "must be one of parquet, jsonl" in refused("export", "outputs/r", "dest", "export.format=csv")
    assert refused("verify", "outputs/r", "--quick", "--deep") == "--quick --deep: at most one of them"
    assert len(placed) == 1 and not Path("dest").exists() and not Path("outputs/r/retries").exists()


def test_first_run_freezes_and_the_same_command_goes_on(request_words: list[str], placed: list[tuple[Path, Config]]) -> None:
    assert main(request_words) == 0
    manifest = Manifest.load(RunDir(Path("outputs/r")))
    assert main(["run", *request_words, "engine.block_size=32"]) == 0
    assert Manifest.load(RunDir(Path("outputs/r"))) == manifest
    assert [(shard.path, shard.num_rows) for shard in manifest.shards] == [("a.parquet", 40), ("b.parquet", 40)]
    assert manifest.columns == ["id", "text"] and manifest.config.hw.tensor_parallel == "auto"
    assert [root for root, _ in placed] == [Path("outputs/r").absolute()] * 2
    assert [config.engine.block_size for _, config in placed] == [16, 32]
    assert placed[0][1].hw.tensor_parallel == 1  # submissions get facts
    assert manifest.config.model.dtype == "float32"  # auto on this hardware; completions depend on it


def test_another_request_in_the_same_folder_is_refused(
    request_words: list[str], placed: list[tuple[Path, Config]], refused: Refusal
) -> None:
    assert main(request_words) == 0
    said = refused(*request_words, "seed=7", "sampling.temperature=0.5", "launcher.nodes=2")
    assert "seed was 0, now 7" in said and "sampling.temperature was 0.0, now 0.5" in said and "nodes" not in said
    assert refused(*request_words, "input.rows_per_unit=8").startswith("input.rows_per_unit=8: must stay 16")
    pq.write_table(pa.table({"id": range(3), "text": ["w1"] * 3}), "in/c.parquet")
    assert "input.shards was" in refused(*request_words)
    assert len(placed) == 1


def test_resume_changes_what_may_change(request_words: list[str], placed: list[tuple[Path, Config]], refused: Refusal) -> None:
    assert main([*request_words, "seed=3"]) == 0
    os.rename("outputs/r", "moved")
    assert main(["resume", "moved", "hw.gpus_per_node=2", "engine.max_num_seqs=4", "launcher=inline", "verbose=true"]) == 0
    root, config = placed[-1]
    assert root == Path("moved").absolute() and config.output.dir == str(root) and config.seed == 3
    assert (config.hw.gpus_per_node, config.engine.max_num_seqs, config.launcher.kind, config.verbose) == (2, 4, "inline", True)
    assert refused("resume", "moved", "seed=4").startswith("seed=4: cannot change when a run is resumed; what may: hw, launcher,")
    assert refused("resume", "moved", "hw.tensor_parallel=3").startswith("hw.tensor_parallel=3: must be auto or divide")


def test_a_moved_checkpoint_and_moved_inputs_are_the_same_request(
    request_words: list[str], placed: list[tuple[Path, Config]], checkpoint: Path, refused: Refusal
) -> None:
    assert main(request_words) == 0
    os.rename(checkpoint, "elsewhere")
    os.rename("in", "there")
    assert refused("resume", "outputs/r", "input.paths=[there]").count(str(checkpoint)) == 1
    assert main(["resume", "outputs/r", "model.path=elsewhere", "input.paths=[there]"]) == 0
    assert placed[-1][1].model.path == str(Path("elsewhere").absolute())
    words_tokenizer(299).save("elsewhere/tokenizer.json")
    assert "model.tokenizer was" in refused("resume", "outputs/r", "model.path=elsewhere", "input.paths=[there]")


def test_what_would_fail_on_the_node_fails_here(
    request_words: list[str], placed: list[tuple[Path, Config]], refused: Refusal
) -> None:
    assert "do not fit into" in refused(*request_words, "hw.mem_gb=1", "engine.gpu_memory_utilization=0.01")
    assert refused(*request_words, "input.prompt_column=txt").startswith("input.prompt_column: the input has no column 'txt'")
    assert "needs a chat template" in refused(*request_words, "input.apply_chat_template=true")
    assert refused(*request_words, "model.max_model_len=1000").startswith("model.max_model_len=1000: must be at most 128")
    assert "holds no *.safetensors file" in refused(*request_words, "model.load_format=safetensors")
    assert placed == [] and not Path("outputs").exists()


def weights(**tensors: list[int]) -> bytes:
    """A safetensors file of zeros."""
    ends = dict(zip(tensors, accumulate(4 * math.prod(shape) for shape in tensors.values()), strict=True))
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [ends[name] - 4 * math.prod(shape), ends[name]]}
        for name, shape in tensors.items()
    }
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(max(ends.values()))


def test_weights_that_no_node_could_load_are_refused_here(
    checkpoint: Path, request_words: list[str], placed: list[tuple[Path, Config]], refused: Refusal
) -> None:
    words = [*request_words, "model.load_format=safetensors"]
    single, index, part = (checkpoint / name for name in ("model.safetensors", "model.safetensors.index.json", "p.safetensors"))
    single.write_bytes(weights(a=[2, 3]))
    assert main(words) == 0 and placed
    single.write_bytes(weights(a=[2, 3])[:-1])
    assert refused(*words).startswith(f"{single} is not a safetensors file, or it is cut short: its header describes ")
    single.rename(checkpoint / "other.safetensors")
    assert refused(*words).startswith(f"model.path={checkpoint} holds neither model.safetensors nor model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": part.name, "b": part.name}}))
    assert refused(*words) == f"{part} is missing: the checkpoint's index names it"
    part.write_bytes(weights(a=[2]))
    assert refused(*words) == f"{part} lacks b, which the checkpoint's index says it holds"
    index.unlink()
    single.mkdir()
    cannot = f"cannot read {single} (Is a directory); it must be a checkpoint folder that you may read"
    assert refused(*words) == f"model.path={checkpoint}: {cannot}"
    assert refused(*request_words, "model.path=in/../checkpoint").endswith("that you may read"), "by whatever way it is named"
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").mkdir()
    assert f"cannot read {checkpoint}/config.json (Is a directory)" in refused(*words)


def test_a_disk_that_would_soon_be_full_is_refused_here(
    request_words: list[str], placed: list[tuple[Path, Config]], refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run, and one that is to go on."""
    assert main(request_words) == 0
    monkeypatch.setattr(os, "statvfs", lambda place: os.statvfs_result((4096, 4096, 9999, 256, 256, 9, 9, 9, 0, 255)))
    for words in (["run_name=other", *request_words[:-2]], ["resume", "outputs/r"]):
        assert "must have at least 32 MiB free, and its file system has 1.0 MiB" in refused(*words)
    assert len(placed) == 1 and os.listdir("outputs") == ["r"]


def test_multirun_is_one_run_for_each_combination(request_words: list[str], placed: list[tuple[Path, Config]]) -> None:
    assert main([*request_words, "seed=1,2", "--multirun"]) == 0
    assert [(root.name, config.seed) for root, config in placed] == [("r_0", 1), ("r_1", 2)]


def test_cancel_covers_the_submissions_so_far(request_words: list[str], placed: list[tuple[Path, Config]]) -> None:
    assert main(request_words) == 0
    run_dir = RunDir(Path("outputs/r"))
    for _ in range(2):
        run_dir.new_submission()
    assert main(["cancel", "outputs/r"]) == 0
    assert run_dir.is_cancelled(2) and not run_dir.is_cancelled(3)


def test_interrupt_is_130(request_words: list[str], placed: list[tuple[Path, Config]], monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(run_dir: RunDir, config: Config, expected: None) -> int:
        raise KeyboardInterrupt

    def returning(run_dir: RunDir, config: Config, expected: None) -> int:
        placed.append((run_dir.root, config))
        return 130

    monkeypatch.setattr(sys.modules["batchinfer.job.launch"], "run_job", raising)
    assert main(request_words) == 130
    monkeypatch.setattr(sys.modules["batchinfer.job.launch"], "run_job", returning)
    assert main([*request_words, "seed=1,2,3", "--multirun"]) == 130 and len(placed) == 1


def test_plan_says_what_would_happen(request_words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *request_words, "hw.gpus_per_node=4", "hw.tensor_parallel=2"]) == 0
    out = capsys.readouterr().out
    assert "80 rows of 2 shards" in out and re.search(r"about 240 \(from \d+ rows\)", out) and "2 replicas of 2 ranks" in out
    assert not Path("outputs").exists()


def test_plan_counts_what_rows_ask_for_themselves(
    request_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [{"max_tokens": 40}] * 100
    pq.write_table(pa.table({"text": ["w1 w2"] * 100, "own": own}), tmp_path / "own.parquet")
    words = [*request_words, "input.paths=[own.parquet]", "sampling.max_tokens=10"]
    assert main(["plan", *words]) == 0
    assert re.search(r"\ncompletion tokens: +at most 1,000\n", capsys.readouterr().out)
    assert main(["plan", *words, "input.sampling_column=own"]) == 0
    assert re.search(r"\ncompletion tokens: +about 4,000 at full length \(from \d+ rows\)\n", capsys.readouterr().out)


def test_plan_without_a_checkpoint_or_a_fit(request_words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in request_words if not word.startswith(("model", "hw"))]
    assert main(["plan", *words, "model=llama3_70b", "hw=a100x8"]) == 0
    out = capsys.readouterr().out
    assert "70,553,706,496 parameters in bfloat16" in out and "no tokenizer" in out
    assert re.search(r"\ntime: +about \S+ s, [\d,]+ tokens/s out, \S+ GPU-hours\n", out)
    assert main(["plan", *words, "model=llama3_70b", "hw=rtx4090x2"]) == 2
    captured = capsys.readouterr()
    assert "80 rows" in captured.out and "do not fit into 21.1 GiB of 23.5 GiB on rtx4090" in captured.err
    assert "may be used: DOES NOT FIT, 66.7 GiB are missing\n" in captured.out
    assert "\nwould fit:          4 x a100-80gb, or 4 x h100, or 2 x h200\n" in captured.out and "\ntime:" not in captured.out


def test_plan_on_two_small_cards(request_words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """13B in float16: 24.2 GiB of weights are too many for one of 24 GB, half of them are not."""
    words = [word for word in request_words if not word.startswith(("model", "hw"))]
    assert main(["plan", *words, "model=llama13b", "hw=rtx4090x2"]) == 0
    out = capsys.readouterr().out
    assert "1 replica of 2 ranks (hw.tensor_parallel=auto)" in out and "21.1 GiB of 23.5 GiB may be used: fits" in out
    for part in ("weights           12.1 GiB", "overhead          0.6 GiB of CUDA context, 0.5 GiB between ranks"):
        assert f"\n  {part}\n" in out
    assert re.search(r"\n  which holds       19,\d{3} tokens: 4 sequences of full length at once\n", out)
    assert re.search(r"\n  2 x 1 +- +- +- +-  needs 28.5 GiB\n  1 x 2 +19,\d{3} +[\d,]+ +\S+ s +\S+  chosen\n", out)
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 100
    assert main(["plan", *words, "model=llama13b", "hw=rtx4090x2", "hw.tensor_parallel=1"]) == 2
    assert capsys.readouterr().err.endswith("; hw.tensor_parallel=2, or 1 x a100-80gb, or 1 x h100, or 1 x h200 would fit\n")


def test_a_run_takes_the_layout_that_the_plan_shows(
    request_words: list[str], checkpoint: Path, placed: list[tuple[Path, Config]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The best for these rows, on a resume too."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    (checkpoint / "config.json").write_text(json.dumps(ARCHITECTURE | sizes))
    words = [*(word for word in request_words if word != "hw=cpu"), "hw=h200x8", "model.dtype=bfloat16"]
    assert main(["plan", *words]) == 0
    chosen = re.search(r"\n  \d x (\d) .* chosen\n", capsys.readouterr().out)
    assert chosen is not None and main(words) == 0 and main(["resume", "outputs/r"]) == 0
    assert [config.hw.tensor_parallel for _, config in placed] == [int(chosen[1])] * 2
    assert yaml.safe_load(Path("outputs/r/config.yaml").read_text())["hw"]["tensor_parallel"] == "auto"


def test_help_shows_verbs_groups_and_keys(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    at = [out.index(text) for text in ("status RUN_DIR [--watch]", "hw: a100x4, a100x8, auto, cpu,", "* sampling.top_p=1.0")]
    assert at == sorted(at)
    assert "; one of error, truncate_left, truncate_right\n" in out and "; above 0 and at most 1\n" in out
    assert main(["status", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m batchinfer status RUN_DIR [--watch]\n")
    assert main(["--cfg", "job", "hw=a100x4"]) == 0
    assert "gpu: a100-80gb" in capsys.readouterr().out
    assert main(["--info", "defaults"]) == 0
    assert list(tmp_path.iterdir()) == []


def fresh(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_looking_at_a_run_imports_next_to_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from batchinfer.cli import main; main(['status', 'x']); "
        "heavy = {'torch', 'hydra', 'omegaconf', 'pyarrow', 'submitit', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_million_rows_are_planned_in_seconds_without_torch(request_words: list[str], tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    pq.write_table(pa.table({"text": ["w1 w2"] * 1000}), many / "0000.parquet")
    for i in range(1, 1000):
        os.link(many / "0000.parquet", many / f"{i:04d}.parquet")
    words = ["plan", *request_words, "input.paths=[many]", "input.rows_per_unit=1024"]
    done = fresh(
        f"import sys, time; from batchinfer.cli import main; t = time.monotonic(); code = main({words!r}); "
        "assert 'torch' not in sys.modules; print('took', time.monotonic() - t); sys.exit(code)",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "1,000,000 rows of 1,000 shards" in done.stdout and "about 2,000,000 (from 320 rows)" in done.stdout
    took = re.search(r"took (\S+)", done.stdout)
    assert took is not None and float(took[1]) < 10
