"""What the processes of a bench do, each in this one: our engine, transformers on the same weights, the ceilings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from batchinfer.bench import ceilings, hf, ours, task
from batchinfer.bench.workloads import BenchRequest, Workload
from batchinfer.config import BenchConfig, Config, EngineConfig, HardwareConfig, InputConfig, ModelConfig
from batchinfer.engine.engine import Engine, build_engine
from batchinfer.engine.sequence import Request
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel
from batchinfer.roofline import Ceilings

CPU = torch.device("cpu")
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
}
CONFIG = Config(
    model=ModelConfig(load_format="random", architecture=ARCHITECTURE, dtype="float32"),
    hw=HardwareConfig(tensor_parallel=1),
    input=InputConfig(paths=["none"], prompt_column="none"),  # a bench does not look at it
    engine=EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=16),
    bench=BenchConfig(num_requests=6, input_len=[5, 12], output_len=[2, 6]),
)


def make_task(folder: Path, config: Config = CONFIG) -> task.Task:
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    made = task.Task(folder, config, str(folder))
    made.save()
    assert task.Task.load(str(folder)) == made
    return made


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(CONFIG, load_shape(CONFIG.model), TensorParallel(), CPU)


def test_a_workload_is_run_to_its_end_and_counted(engine: Engine, tmp_path: Path) -> None:
    (workload,) = make_task(tmp_path).workloads()
    timing = ours.run_workload(engine, workload.requests)
    assert (timing.ran, timing.tokens_in, timing.tokens_out) == (6, workload.tokens_in, workload.tokens_out)
    assert timing.first_token_s is not None and 0 < timing.first_token_s < timing.seconds
    assert (timing.peak_running, timing.preemptions, timing.recomputed_tokens) == (4, 0, 0)
    assert timing.steps is not None and timing.steps > 6 and not engine.has_work()


def test_a_repetition_finds_nothing_of_the_one_before(engine: Engine) -> None:
    requests = [BenchRequest(list(range(20)), 2)]
    ours.forget_prefixes(engine)
    assert ours.run_workload(engine, requests).prefix_hit_tokens == 0
    assert ours.run_workload(engine, requests).prefix_hit_tokens == 16  # so this is what forgetting is for
    ours.forget_prefixes(engine)
    assert ours.run_workload(engine, requests).prefix_hit_tokens == 0
    timing = ours.measure(engine, Workload("w", requests), BenchConfig(repeat=3))
    assert timing.prefix_hit_tokens == 0 and len(timing.all_seconds) == 3
    assert timing.seconds == sorted(timing.all_seconds)[1]


def test_a_request_that_breaks_off_spoils_the_figure(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.step

    def broken() -> Any:
        outputs, stats = step()
        for output in outputs:
            output.error = ("bad_logits", "not numbers")
        return outputs, stats

    monkeypatch.setattr(engine, "step", broken)
    with pytest.raises(RuntimeError, match="request 0: not numbers"):
        ours.run_workload(engine, [BenchRequest([1, 2], 3)])
    monkeypatch.undo()
    while engine.has_work():
        engine.step()


def test_transformers_has_our_weights_and_draws_our_tokens(engine: Engine, tmp_path: Path) -> None:
    made = make_task(tmp_path)
    model = hf.load_model(made, CPU)
    (workload,) = made.workloads()
    ours.forget_prefixes(engine)
    mine: dict[int, list[int]] = {number: [] for number in range(len(workload.requests))}
    for number, request in enumerate(workload.requests):
        engine.add(Request(number, request.token_ids, ours.to_engine(0, BenchRequest([0], 4)).sampling, seed=0))
    while engine.has_work():
        for output in engine.step()[0]:
            mine[output.request_id] += output.token_ids
    theirs = hf.generate(model, workload.requests, 4)  # one padded batch
    assert theirs == list(mine.values())


def test_transformers_stops_in_time_and_the_rest_is_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workload,) = make_task(tmp_path).workloads()
    asked: list[tuple[int, int]] = []
    clock = iter(range(1000))
    monkeypatch.setattr(hf, "generate", lambda model, requests, count: asked.append((len(requests), count)))
    monkeypatch.setattr(hf.time, "perf_counter", lambda: float(next(clock)))
    timing = hf.run(None, workload, 2, limit_s=2)
    assert timing.ran == 4 and timing.seconds == 2 and timing.first_token_s is None
    assert [size for size, _ in asked] == [2, 2, 2]  # the first warms up
    assert timing.whole(workload) == 2 * workload.tokens_out / timing.tokens_out > 2
    everything = hf.run(None, workload, 4, limit_s=100)
    assert everything.ran == 6 and everything.whole(workload) == everything.seconds == 2
    shuffled = [request for batch in hf.batches(workload, 4) for request in batch]
    assert sorted(map(id, shuffled)) == sorted(map(id, workload.requests)) and shuffled != workload.requests


def test_ceilings_of_a_cpu() -> None:
    scale = ceilings.Scale(1 << 16, 1 << 12, (1, 4), 16, (), 1)
    found = ceilings.measure(load_shape(CONFIG.model), torch.float32, TensorParallel(), CPU, scale)
    assert min(found.read, found.copy, found.attention, found.best_gemm) > 0 and found.all_reduce == ()
    assert [rows for rows, _ in found.gemm] == [1, 4]
    assert Ceilings.from_dict(json.loads(json.dumps(vars(found)))) == found


def test_gemms_are_those_of_the_model() -> None:
    shape = load_shape(CONFIG.model)
    assert ceilings.layer_weights(shape, 1) == [(64, 32), (32, 32), (128, 32), (32, 64)]
    assert ceilings.layer_weights(shape, 2) == [(32, 32), (32, 16), (64, 32), (32, 32)]


def test_answers_survive_their_file(tmp_path: Path) -> None:
    answer = task.Answer({"torch": "2"}, {"ready": 1.5}, 100, failures={"w": "no"})
    answer.put(Workload("w", []), "", task.Timing(1, 2, 3, 4.0, [4.0]))
    answer.save(tmp_path / "x.json")
    assert task.Answer.load(tmp_path / "x.json") == answer
    assert task.Answer.load(tmp_path / "absent.json") == task.Answer()


def test_a_side_that_fails_says_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_task(tmp_path)

    def work(_: task.Task) -> None:
        raise ValueError("it\nbroke")

    assert task.run_side(work, [str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "batchinfer: ValueError: it broke"
    assert task.run_side(lambda _: None, [str(tmp_path)]) == 0
