"""A rank killed in the middle of a step on two GPUs: the other waits for it on its device, where nothing tells it."""

from __future__ import annotations

import shutil
import time
from importlib.resources import files
from pathlib import Path

import pynvml
import pytest
import torch

from batchinfer.hardware import visible_gpus
from tests.checkpoints import save_checkpoint
from tests.run.deaths import kill_rank
from tests.run.jobs import batchinfer, start, wait_until_gone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]

TIER = ["hw=auto", "hw.gpus_per_node=2", "hw.tensor_parallel=2"]
REQUEST = [  # thousands of steps, of a size that is captured
    "input.limit=160",
    "input.rows_per_unit=4",
    "sampling.max_tokens=400",
    "sampling.ignore_eos=true",
    "engine.max_num_seqs=8",
]
OTHERS_BYTES = 64 << 20  # by which the use of a GPU may differ without us


def checkpoint(folder: Path) -> Path:
    """Small, and of sizes that the kernels take: the tiny model's heads are too small for them."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    others = {"vocab_size": 4096, "num_hidden_layers": 8, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1}
    save_checkpoint(folder, dtype=torch.bfloat16, **sizes, **others)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(files("batchinfer.tiny") / "model" / name), folder)
    return folder


def used_memory() -> list[int]:
    """Bytes in use on each visible GPU, by whomever."""
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in visible_gpus()]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def assert_memory_is_back(before: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while any(now > then + OTHERS_BYTES for now, then in zip(used_memory(), before, strict=True)):
        assert time.monotonic() < deadline, f"in use before {before}, after {used_memory()}"
        time.sleep(0.2)


def test_a_killed_rank_leaves_nothing_and_a_fresh_replica_goes_on(tmp_path: Path) -> None:
    """First a follower, then, in the fresh replica, the rank that owns the rows."""
    model, run_dir, log = checkpoint(tmp_path / "model"), tmp_path / "run", tmp_path / "log"
    before = used_memory()
    job = start(*REQUEST, *TIER, f"model.path={model}", "launcher=local", f"output.dir={run_dir}", log=log)
    seconds = [kill_rank(1, run_dir, "01-0-0", "01-0-0.1"), kill_rank(0, run_dir, "01-0-0.1", "01-0-0.2")]
    assert job.wait(timeout=240) == 0, log.read_text()
    said = log.read_text()
    for rank, name in ((1, "01-0-0"), (0, "01-0-0.1")):
        assert f"replica {name} died (rank {rank} was killed by SIGKILL" in said
    print("seconds from the kill to the fresh replica:", *(f"{s:.1f}" for s in seconds))
    assert max(seconds) < 15, "torchrun would kill who does not end by itself after 30 s"
    verified = batchinfer("verify", run_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert not wait_until_gone(run_dir, 5)
    assert_memory_is_back(before)
