"""Arithmetic of memory, on shapes small enough to check by hand, beside what was measured and what was claimed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer import hardware
from batchinfer.compose import compose
from batchinfer.config import Config, ConfigError, EngineConfig, HardwareConfig, ModelConfig
from batchinfer.hardware import GIB
from batchinfer.job.layout import choose, layouts
from batchinfer.memory import MemoryPlan, kv_blocks, max_model_len, plan_memory
from batchinfer.model.config import ModelShape, load_shape
from batchinfer.model.rope_config import YarnRope
from tests.nvml import Driver

SHAPE = ModelShape(
    "LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
ENGINE = EngineConfig(block_size=16, max_num_seqs=4, max_num_batched_tokens=128)


def planned(model: str, hw: str, *overrides: str) -> tuple[HardwareConfig, ModelShape, Config]:
    config = compose([f"model={model}", f"hw={hw}", *overrides], planning=True)
    shape = load_shape(config.model)
    return choose(config.hw, layouts(config, shape)).hw, shape, config


def test_kv_cache_by_hand() -> None:
    plan = plan_memory(SHAPE, "bfloat16", HardwareConfig(gpu="h100", tensor_parallel=1), ENGINE, 100)
    assert plan.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, width, bytes
    assert plan.num_blocks == 4 * 7  # never more than four sequences of 100 tokens can use
    assert plan.concurrent_sequences == 4 and plan.kv_tokens == 28 * 16 and plan.fits
    assert abs(plan.usable_bytes - 79.1 * GIB * 0.9) < 2


def test_blocks_are_what_the_free_bytes_hold() -> None:
    per_block = 16 * SHAPE.kv_bytes_per_token("bfloat16", 1)
    assert kv_blocks(3 * per_block + 1, SHAPE, "bfloat16", 1, ENGINE, 512) == 3
    assert kv_blocks(-5, SHAPE, "bfloat16", 1, ENGINE, 512) == 0


def test_parts_stay_within_the_whole() -> None:
    hw, shape, config = planned("llama13b", "a100x4")
    plan = plan_memory(shape, "bfloat16", hw, replace(config.engine, max_num_seqs=100_000), 4096)
    used = plan.total_bytes - plan.graph_bytes
    block = plan.block_size * plan.kv_bytes_per_token
    assert plan.usable_bytes - block < used <= plan.usable_bytes


def one_rank(model: str, gpu: str, *overrides: str, ranks: int = 1) -> MemoryPlan:
    config = compose([f"model={model}", "hw=h200x1", f"hw.gpu={gpu}", *overrides], planning=True)
    shape = load_shape(config.model)
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    return plan_memory(shape, dtype, replace(config.hw, tensor_parallel=ranks), config.engine, max_model_len(config.model, shape))


@pytest.mark.parametrize(
    ("model", "ranks", "measured"),
    [
        ("llama7b", 1, 229_984),
        ("mistral7b", 1, 912_256),
        ("llama7b", 2, 482_288),
        ("llama13b", 2, 292_928),
        ("llama13b", 4, 618_640),
    ],
)
def test_measured_kv_caches_are_predicted(model: str, ranks: int, measured: int) -> None:
    """On one to four H200 (docs/performance.md), where one way or the other 5 % are promised."""
    plan = one_rank(model, "h200", "model.max_model_len=2048", ranks=ranks)
    off = plan.kv_tokens / measured - 1
    print(f"{model} TP {ranks}: predicted {plan.kv_tokens:,} tokens, measured {measured:,} ({off:+.2%})")
    assert plan.kv_tokens == pytest.approx(measured, rel=0.05)


# --- the original design's memory table: claims, in GB, read by nothing but these tests

CLAIMED = {"llama7b": 14.0, "llama13b": 26.0}
CLAIMED_KV, CLAIMED_TOTAL = 1.1, 16.6  # of 7B at 2,048 tokens, batch 1
GB = 1e9


@pytest.mark.parametrize(("model", "exact", "fits"), [("llama7b", 13.476_831, True), ("llama13b", 26.031_729, False)])
def test_claimed_weights_beside_the_exact_ones(model: str, exact: float, fits: bool) -> None:
    plan = one_rank(model, "rtx4090", "model.dtype=float16", "model.max_model_len=2048", "engine.max_num_seqs=1")
    assert plan.weight_bytes / GB == pytest.approx(exact, abs=1e-6)
    assert CLAIMED[model] == pytest.approx(exact, rel=0.05)
    assert plan.fits == fits


def test_claimed_memory_of_a_7b_beside_the_derived() -> None:
    """At batch 1: the KV cache of one sequence of 2,048 tokens, and what the engine takes besides with its own settings."""
    plan = one_rank("llama7b", "rtx4090", "model.dtype=float16", "model.max_model_len=2048")
    assert plan.sequence_bytes == 2048 * 2 * 32 * 32 * 128 * 2
    assert pytest.approx(plan.sequence_bytes / GB, rel=0.05) == CLAIMED_KV
    derived = (plan.total_bytes - plan.kv_bytes + plan.sequence_bytes) / GB
    print(f"7B at batch 1: claimed {CLAIMED_TOTAL} GB, derived {derived:.2f} GB ({derived / CLAIMED_TOTAL - 1:+.1%})")
    assert derived == pytest.approx(CLAIMED_TOTAL, rel=0.05)
    assert derived * GB < plan.device_bytes


def test_processes_on_a_cpu_are_replicas_unless_told_otherwise() -> None:
    assert planned("llama7b", "cpu", "hw.gpus_per_node=4")[0].tensor_parallel == 1
    assert planned("llama7b", "cpu", "hw.gpus_per_node=4", "hw.tensor_parallel=2")[0].tensor_parallel == 2
    with pytest.raises(ConfigError, match=r"hw.tensor_parallel=3 does not divide the model's 32 attention heads"):
        planned("llama7b", "cpu", "hw.gpus_per_node=3", "hw.tensor_parallel=3")


def test_what_does_not_fit_says_what_would() -> None:
    hw, shape, config = planned("llama3_70b", "h200x1")
    plan = plan_memory(shape, "bfloat16", hw, config.engine, 131072)
    assert not plan.fits and "131.4 GiB of weights" in plan.explain() and "do not fit into 125.7 GiB" in plan.explain()
    assert plan.explain().endswith("; hw.tensor_parallel=2 on a node of 2 x h200 would fit")
    wider = plan_memory(shape, "bfloat16", replace(hw, gpus_per_node=2, tensor_parallel=2), config.engine, 131072)
    assert wider.fits


def test_shorter_sequences_are_advised_and_then_fit() -> None:
    hw, shape, config = planned("mistral7b", "rtx4090x2", "engine.gpu_memory_utilization=0.75", "hw.tensor_parallel=1")
    plan = plan_memory(shape, "bfloat16", hw, config.engine, 32768)
    assert not plan.fits
    advised = int(plan.advice.split("model.max_model_len=")[1].split(",")[0])
    assert plan_memory(shape, "bfloat16", hw, config.engine, advised).fits
    assert not plan_memory(shape, "bfloat16", hw, config.engine, advised + 16).fits


def test_what_would_fit_is_named_from_near_to_far_and_fits() -> None:
    hw, shape, config = planned("llama13b", "rtx4090x2", "hw.tensor_parallel=1")
    plan = plan_memory(shape, "float16", hw, config.engine, 4096)
    assert not plan.fits and plan.kv_tokens == 0
    assert plan.advice == "hw.tensor_parallel=2, or 1 x a100-80gb, or 1 x h100, or 1 x h200 would fit"
    assert plan_memory(shape, "float16", replace(hw, tensor_parallel=2), config.engine, 4096).fits
    assert plan_memory(shape, "float16", replace(hw, gpu="a100-80gb"), config.engine, 4096).fits


def test_captured_graphs_take_what_may_not_be_used() -> None:
    _, shape, config = planned("llama7b", "h200x1")
    hw = replace(config.hw, tensor_parallel=1)
    with_graphs = plan_memory(shape, "bfloat16", hw, config.engine, 2048)
    without = plan_memory(shape, "bfloat16", hw, replace(config.engine, cuda_graphs=False), 2048)
    assert 0 < with_graphs.graph_bytes < with_graphs.device_bytes - with_graphs.usable_bytes and without.graph_bytes == 0
    assert with_graphs.kv_tokens == without.kv_tokens


def test_processes_share_the_host() -> None:
    one = plan_memory(SHAPE, "float32", HardwareConfig(mem_gb=8, tensor_parallel=1), ENGINE, 100)
    two = plan_memory(SHAPE, "float32", HardwareConfig(mem_gb=8, gpus_per_node=2, tensor_parallel=1), ENGINE, 100)
    assert one.device_bytes == 8 * GIB and two.device_bytes == 4 * GIB


def test_longest_sequence() -> None:
    assert max_model_len(ModelConfig(), SHAPE) == 512
    assert max_model_len(ModelConfig(max_model_len=100), SHAPE) == 100
    with pytest.raises(ConfigError, match=r"model.max_model_len=513: must be at most 512, the model's max_position_embeddings"):
        max_model_len(ModelConfig(max_model_len=513), SHAPE)
    scaled = replace(SHAPE, rope_scaling=YarnRope(4.0, 256, 1.1))
    assert max_model_len(ModelConfig(), scaled) == 512
    assert max_model_len(ModelConfig(max_model_len=1024), scaled) == 1024
    with pytest.raises(
        ConfigError, match=r"model.max_model_len=1025: must be at most 1024, what the model's rope scaling reaches"
    ):
        max_model_len(ModelConfig(max_model_len=1025), scaled)


def test_unknown_gpu_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^hw.gpu=b300: must be auto, null, a GPU of this host, or one of rtx4090, "):
        planned("llama7b", "a100x4", "hw.gpu=b300")


# --- the host, through a driver of straw


H200 = {"name": "NVIDIA H200", "uuid": "GPU-aaaa-1", "gib": 140}
L4 = {"name": "NVIDIA L4", "uuid": "GPU-bbbb-2", "gib": 22}
CUT = {
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-cccc-3",
    "gib": 80,
    "slices": [
        {"name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "uuid": "MIG-1", "gib": 10},
        {"name": "NVIDIA H100 80GB HBM3 MIG 2g.20gb", "uuid": "MIG-2", "gib": 20},
    ],
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver(H200, L4, CUT)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (None, ["GPU-aaaa-1", "GPU-bbbb-2", "MIG-1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,0", ["GPU-bbbb-2", "GPU-aaaa-1"]),
        ("0,9,1", ["GPU-aaaa-1"]),
        ("GPU-bbbb-2", ["GPU-bbbb-2"]),
        ("GPU-b", ["GPU-bbbb-2"]),
        ("GPU-", []),
        ("MIG-2", ["MIG-2"]),
        ("MIG-9,0", []),
        ("2", ["MIG-1"]),
    ],
)
def test_the_mask_is_read_as_cuda_reads_it(driver: Driver, mask: str | None, seen: list[str]) -> None:
    assert [gpu.uuid for gpu in hardware.visible_gpus(mask)] == seen
    assert driver.open == 0


def test_names_of_the_table_and_of_the_driver(driver: Driver) -> None:
    assert [gpu.gpu for gpu in hardware.visible_gpus()] == ["h200", "NVIDIA L4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    assert hardware.gpu_memory_bytes("NVIDIA L4") == 22 * GIB and hardware.gpu_memory_bytes("b300") is None


def test_auto_is_this_host(driver: Driver) -> None:
    driver.gpus = (L4, {**L4, "uuid": "GPU-dddd-4"})
    hw, _, _ = planned("mistral7b", "auto", "model.max_model_len=2048")
    assert (hw.gpu, hw.gpus_per_node, hw.tensor_parallel) == ("NVIDIA L4", 2, 1)
    with pytest.raises(ConfigError, match=r"hw.gpus_per_node=3: must be at most 2, the GPUs of this host"):
        planned("mistral7b", "auto", "hw.gpus_per_node=3")


def test_no_driver_means_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Driver())
    hw, _, _ = planned("llama7b", "auto")
    assert (hw.gpu, hw.gpus_per_node, hw.tensor_parallel) == (None, 1, 1)


def test_float64_needs_the_cpu(driver: Driver) -> None:
    with pytest.raises(ConfigError, match=r"model.dtype=float64: must run on a CPU"):
        planned("llama7b", "auto", "model.dtype=float64")


def host(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    everything = {"proc/self/cgroup": cgroup, "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n", **files}
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cgroup_v2_limits_count_up_to_the_root(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        "0::/job/step\n",
        {
            "sys/fs/cgroup/job/step/cpu.max": "max 100000",
            "sys/fs/cgroup/job/cpu.max": "100000 100000",
            "sys/fs/cgroup/job/memory.max": "5000000",
            "sys/fs/cgroup/job/memory.current": "4000000",
            "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 500000\n",
            "sys/fs/cgroup/job/step/memory.max": "max",
        },
    )
    assert hardware.usable_cores(root) == 1
    assert hardware.available_memory(root) == 1_500_000


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        "2:cpu,cpuacct:/job\n3:memory:/job\n",
        {
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000",
        },
    )
    assert hardware.usable_cores(root) == 1
    assert hardware.available_memory(root) == 2000


def test_a_host_without_limits(tmp_path: Path) -> None:
    quota = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1000"}
    root = host(tmp_path, "1:cpu:/\n", quota)
    assert hardware.available_memory(root) == 8000 * 1024
    assert hardware.usable_cores(root) >= 1
