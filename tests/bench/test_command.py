"""The verb as a whole on a CPU: sides that run, sides that die, and what is refused before anything starts."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchinfer import hardware
from batchinfer.bench import command
from batchinfer.bench.results import collect
from batchinfer.bench.table import HEAD, aligned, facts, rows, verdict
from batchinfer.bench.task import Answer, Task, Timing
from batchinfer.cli import main
from batchinfer.hardware import VisibleGPU
from tests.bench.test_floor import H200
from tests.bench.test_sides import ARCHITECTURE, CONFIG, make_task

WORDS = [
    "bench",
    "hw=cpu",
    "model.path=null",
    "model.load_format=random",
    "model.architecture={" + ", ".join(f"{key}: {value}" for key, value in ARCHITECTURE.items()).replace("'", "") + "}",
    "bench.num_requests=5",
    "bench.input_len=[4,9]",
    "bench.output_len=[2,5]",
]


@pytest.fixture(autouse=True)
def folders_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_a_bench_from_command_to_table(capsys: pytest.CaptureFixture[str], folders_of_its_own: Path) -> None:
    assert main([*WORDS, "bench.peers=[hf]", "bench.peer_s=0.5"]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    own = found["workloads"]["custom"]["batchinfer"]
    assert own["ran"] == 5 and own["seconds"] > 0 and found["kv_tokens"] >= 128 and found["failures"] == {}
    assert next(iter(found["phases_s"])) == "import" and found["ready_s"] == found["phases_s"]["ready"] > 0
    assert found["workloads"]["custom"]["times_floor"]["sequential"] > 0
    assert list(found["workloads"]["custom"]["peers"]) == ["hf one by one", "hf batches of 5"]
    assert found["conditions"]["dtype"] == "float32" and found["conditions"]["transformers"]
    assert any(line.startswith("floor, one after the other") for line in out)
    assert list(folders_of_its_own.iterdir()) == []


def test_a_side_that_dies_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folders_of_its_own: Path
) -> None:
    monkeypatch.setitem(command.PEER_MODULES, "hf", "batchinfer.no_such_module")
    monkeypatch.setitem(command.MODULES, "ceilings", "batchinfer.no_such_module")
    assert main([*WORDS, "bench.peers=[hf]"]) == 0
    captured = capsys.readouterr()
    lines, found = captured.out.splitlines(), json.loads(captured.out.splitlines()[-1])
    assert any(line.startswith("hf: no figures: ") and "no_such_module" in line for line in lines)
    assert found["workloads"]["custom"]["batchinfer"]["ran"] == 5 and found["workloads"]["custom"]["floor"] is None
    assert set(found["failures"]) == {"hf", "ceilings"}
    (kept,) = folders_of_its_own.iterdir()
    assert captured.err.splitlines()[-1] == f"batchinfer: logs of what failed: {kept}" and (kept / "hf.log").exists()
    monkeypatch.setitem(command.MODULES, "batchinfer", "batchinfer.no_such_module")
    assert main([*WORDS, "bench.peers=[]"]) == 1


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert main([*WORDS, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("batchinfer: ")

    return run


def test_mistakes_are_sentences(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, folders_of_its_own: Path) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda: [])
    assert refused("bench.workload=mixd") == "bench.workload=[mixd]: must be a list of custom, mixed, shared, long_out, single"
    assert refused("bench.workload=[]").startswith("bench.workload=[]: must name at least one of custom, mixed,")
    assert refused("bench.workload=[single,nope]").startswith("bench.workload=[single, nope]: must be a list of custom,")
    assert refused("bench.workload=null") == "bench.workload=null: must be a list of texts, [a,b]"
    assert refused("bench.peers=[sglang]") == "bench.peers=[sglang]: must be a list of hf, vllm"
    assert refused("bench.input_len=[9,4]") == "bench.input_len=[9, 4]: must be a number of at least 1, or [lowest, highest]"
    assert refused("bench.output_len=0").startswith("bench.output_len=0: must be a number of at least 1")
    assert refused("bench.output_len=[]").startswith("bench.output_len=[]: must be a number of at least 1")
    assert refused("bench.input_len=[1,2,3]").startswith("bench.input_len=[1, 2, 3]: must be a number of at least 1")
    assert refused("bench.repeat=0") == "bench.repeat=0: must be at least 1"
    assert refused("bench.input_len=200").startswith("bench.workload=custom: request 0 has 200 tokens and")
    assert refused("bench.workload=mixed").startswith("bench.workload=mixed: request 0 has the token id")
    assert refused("bench.requests=none.parquet").startswith("bench.requests=none.parquet: not a Parquet file")
    assert refused("hw=h200x1") == "hw.gpu=h200: needs 1 GPU and this host has 0; run it on such a node, or choose hw=cpu"
    assert refused("--watch").startswith("--watch: no such flag here")
    assert list(folders_of_its_own.iterdir()) == []


def test_peers_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name if name == "transformers" else None)
    assert command.chosen_peers(CONFIG) == ["hf"]
    assert refused("bench.peers=[hf,vllm]") == "bench.peers=[hf, vllm]: vllm is not installed here; peers that are: hf"


def test_another_gpu_than_the_tiers_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from batchinfer.config import HardwareConfig

    monkeypatch.setattr(hardware, "visible_gpus", lambda: [VisibleGPU("h100", 1, "x")])
    command._check_device(HardwareConfig(gpu="h100", tensor_parallel=1))
    assert capsys.readouterr().err == ""
    command._check_device(HardwareConfig(gpu="h200", tensor_parallel=1))
    assert "this host has h100: figures are of the latter" in capsys.readouterr().err


GPU_CONDITIONS: dict[str, Any] = {
    "device": {"name": "NVIDIA H200", "driver": "580", "memory_gib": 140.4, "power_limit_w": 700.0, "sm_clock_mhz": None},
    "gpus": 1,
    "commit": "0123456789abcdef",
    "torch": "2.11",
    "batchinfer": "0.1",
    "architecture": "LlamaForCausalLM",
    "parameters": 7,
    "weights": "random",
    "dtype": "bfloat16",
    "sampling": "greedy",
}


def answered(folder: Path) -> tuple[Task, Any]:
    """A task whose sides have said something."""
    task = make_task(folder)
    (workload,) = task.workloads()
    half = workload.tokens_out // 2
    mine = Answer(phases={"import": 1.0, "ready": 5.0}, kv_tokens=1000)
    mine.put(workload, "", Timing(6, workload.tokens_in, workload.tokens_out, 2.0, [2.0, 3.0], 0.01, 4, 9, 1))
    mine.save(task.answer_file("batchinfer"))
    theirs = Answer(versions={"transformers": "5.17"}, phases={"ready": 9.0}, failures={"custom": "batches of 16: out of memory"})
    theirs.put(workload, "one by one", Timing(3, 1, half, 4.0))
    theirs.save(task.answer_file("hf"))
    task.answer_file("ceilings").write_text(json.dumps(vars(H200)))
    return task, workload


def test_results_and_their_table(tmp_path: Path) -> None:
    task, workload = answered(tmp_path)
    found = collect(task, [workload], ["hf", "vllm"], {"vllm": "it died"}, GPU_CONDITIONS)
    told = found["workloads"]["custom"]
    naive = told["peers"]["hf one by one"]
    assert naive["extrapolated"] and naive["seconds"] == 4.0 * workload.tokens_out / (workload.tokens_out // 2)
    assert told["times_naive_hf"] == naive["seconds"] / 2.0
    assert told["times_floor"]["sequential"] == 2.0 / told["floor"]["sequential_s"]
    assert found["failures"] == {"vllm": "it died", "hf, custom": "batches of 16: out of memory"}
    assert json.loads(json.dumps(found)) is not None
    lines = aligned([HEAD, *rows(told)])
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "batchinfer",
        "floor, one after the other",
        "floor, at the library's GEMM rates",
        "floor, side by side",
        "hf one by one",
    ]
    assert "~8" in lines[-1] and "extrapolated from 3 requests in 4.0 s" in lines[-1]
    assert lines[1].endswith("2.000 to 3.000 s in 2, 9 steps, at most 4 at once, 1 preemptions")
    text = facts(found)
    assert text[0] == "device:    NVIDIA H200, 140.4 GiB, 700 W, driver 580"
    assert text[1] == "software:  torch 2.11, batchinfer 0.1, transformers 5.17, commit 0123456789ab"
    assert text[3].startswith(
        "ceilings:  read 4.22 TB/s, copy 4.29 TB/s read and written, GEMM 792 TFLOP/s at 2,048 rows, 3.30 TF"
    )
    assert text[4] == "start:     ready 5.0 s after the process began (import 1.0 s); beside it hf 9.0 s"
    assert text[5] == "KV cache:  1,000 tokens"


def test_the_promise_is_stated_on_gpus() -> None:
    assert verdict("w", {"times_naive_hf": 2.0}, True) == (
        "w: 2.00 times as fast as naive Hugging Face, one request at a time; at least 1.5 is promised: kept\n"
    )
    assert "NOT kept" in verdict("w", {"times_naive_hf": 1.4}, True)
    assert "promised" not in verdict("w", {"times_naive_hf": 1.4}, False)
    assert verdict("w", {"times_naive_hf": None}, True) == ""


def test_what_a_side_that_never_spoke_leaves_empty(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    found = collect(task, task.workloads(), [], {"batchinfer": "killed by SIGKILL"}, GPU_CONDITIONS)
    assert found["workloads"]["custom"]["batchinfer"] is None and list(rows(found["workloads"]["custom"])) == []
    assert len(facts(found)) == 3


def test_what_was_measured_before_an_interrupt_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(task: Task, side: str) -> str | None:
        if side == "hf":
            signal.raise_signal(signal.SIGTERM)
        answered(task.folder)
        return None

    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(command, "_checkpoint", lambda config, folder: str(folder))
    before = signal.getsignal(signal.SIGTERM)
    assert main([*WORDS, "bench.num_requests=6", "bench.peers=[hf]"]) == 130
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["workloads"]["custom"]["batchinfer"]["seconds"] == 2.0 and found["failures"]["hf"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before
