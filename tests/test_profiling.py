"""The verb `profile`, on a CPU: what it runs, what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from batchinfer.cli import main
from batchinfer.config import ConfigError, ProfileConfig
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.engine import Engine
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import StepResult
from batchinfer.profiling import Work, nsys_command, torchrun_command
from batchinfer.timeline import PHASES, break_down, read_trace

STUB = "{architectures:[LlamaForCausalLM],vocab_size:300,hidden_size:32,intermediate_size:64,num_hidden_layers:2,\
num_attention_heads:4,num_key_value_heads:2,max_position_embeddings:128,eos_token_id:1}"
WORDS = [
    "profile",
    "model=llama7b",
    "model.load_format=random",
    f"model.architecture={STUB}",
    "hw=cpu",
    "engine.max_num_seqs=8",
    "profile.warmup_steps=2",
    "profile.steps=5",
]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    assert main([*WORDS, *words]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*WORDS, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_a_trace_a_table_and_a_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    facts, out = run(capsys)
    trace = tmp_path / "outputs" / "profile-llama7b" / "trace.json.gz"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [trace]
    assert sum(part["share"] for part in facts["categories"].values()) == pytest.approx(1)
    assert facts["categories"]["GEMM"]["calls_a_step"] > 0 and facts["categories"]["attention"]["share"] > 0
    assert (facts["steps"], facts["device"], facts["graph_steps"], facts["preempted"]) == (5, "cpu", 0, 0)
    assert facts["step_ms"] > 0 and facts["profiled_step_ms"] > 0 and facts["sequences"] > 7
    assert all(facts["host_ms"][phase] > 0 for phase in PHASES)
    assert "5 steps on cpu in float32, mixed" in out and "outside of operations" in out and "costliest operations" in out
    assert break_down(read_trace(trace)).idle == facts["idle_share"]


@pytest.mark.parametrize("workload", ["decode", "prefill"])
def test_other_workloads(workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, _ = run(capsys, f"profile.workload={workload}", f"profile.dir={tmp_path}", "engine.overlap=false")
    assert (facts["prefill_tokens"] > 0) == (workload == "prefill")


def test_what_cannot_be_profiled_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "profile.nsys=true: must go with a GPU" in refused(capsys, "profile.nsys=true")
    assert "profile.memory_snapshot=true: must go with a GPU" in refused(capsys, "profile.memory_snapshot=true")
    assert "profile.num_seqs=9: must be at most engine.max_num_seqs=8" in refused(capsys, "profile.num_seqs=9")
    assert "up to 192 tokens, and model.max_model_len leaves 128" in refused(capsys, "profile.prompt_tokens=80")
    assert "profile.workload=idle: must be one of mixed, decode, prefill" in refused(capsys, "profile.workload=idle")


def test_nsys_is_asked_for_the_same_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"nsys is not on PATH here; where it is, this would run: nsys profile .*'a=b c'"):
        nsys_command(tmp_path, ["a=b c"])
    (tmp_path / "nsys").write_text("")
    (tmp_path / "nsys").chmod(0o755)
    command = shlex.join(nsys_command(tmp_path, ["model=tiny"]))
    assert command.endswith("-m batchinfer profile model=tiny") and f"--output={tmp_path}/nsys" in command


def test_ranks_are_started_by_torchrun() -> None:
    assert shlex.join(torchrun_command(2, ["model=tiny"])).endswith("--nproc-per-node=2 -m batchinfer profile model=tiny")


@pytest.mark.slow
def test_two_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "hw.gpus_per_node=2", "hw.tensor_parallel=2", f"profile.dir={tmp_path}"]) == 0
    facts = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert facts["tensor_parallel"] == 2 and facts["categories"]["communication"]["calls_a_step"] > 0


class Answers:
    """A runner without a model."""

    can_retry = False

    def share(self, batch: Any) -> None: ...
    def forward(self, batch: Any) -> None: ...
    def close(self) -> None: ...

    def sample(self, batch: Any, *_: Any) -> Answers:
        self.count = batch.num_samples
        return self

    def result(self) -> StepResult:
        return StepResult([7] * self.count)


def work_over(num_blocks: int, **asked: Any) -> Work:
    scheduler = Scheduler(BlockManager(num_blocks, 16, True), 16, 256, 512)
    return Work(Engine(Answers(), scheduler, frozenset({2}), True), ProfileConfig(**asked), 100, 16)


def test_the_state_is_steady_from_the_beginning() -> None:
    """As many sequences, and as much context, after the filling as a thousand steps later."""
    work = work_over(1000, prompt_tokens=80, output_tokens=40)
    work.fill()
    early = work.run(200)
    work.run(1000)
    late = work.run(200)
    for name in ("running", "kv_blocks_used"):
        means = [sum(getattr(stats, name) for stats in steps) / len(steps) for steps in (early, late)]
        assert means[0] == pytest.approx(means[1], rel=0.1), name
    assert min(stats.running for stats in early + late) >= 15 and sum(stats.preempted for stats in early + late) == 0


def test_fewer_sequences_than_there_is_room_for() -> None:
    work = work_over(1000, workload="decode", num_seqs=5, prompt_tokens=40, output_tokens=40)
    work.fill()
    assert {(stats.running, stats.prefill_tokens) for stats in work.run(20)} == {(5, 0)}


def test_a_prefix_that_all_share_is_computed_once() -> None:
    work = work_over(1000, num_seqs=8, prompt_tokens=40, output_tokens=16, shared_prefix_len=100)
    work.fill()
    stats = work.run(100)
    begun = sum(len(each.ttft_s) for each in stats)
    assert begun > 20 and sum(each.prefix_hit_tokens for each in stats) == pytest.approx(96 * begun, rel=0.2)


def test_a_full_cache_ends_the_filling() -> None:
    work = work_over(40, workload="decode", prompt_tokens=120)
    work.fill()
    assert 0 < work.run(1)[0].running < 16
