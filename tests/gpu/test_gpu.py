"""The whole job on a GPU against the same job on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.run.jobs import batchinfer, completions, texts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

REQUEST = ["model.dtype=float32", "input.limit=64", "sampling.max_tokens=32", "output.token_ids=true", "launcher=inline"]


def test_greedy_tokens_of_the_tiny_model_are_those_of_the_cpu(tmp_path: Path) -> None:
    for hw in ("cpu", "h200x1"):
        result = batchinfer(*REQUEST, f"hw={hw}", f"output.dir={tmp_path / hw}")
        assert result.returncode == 0, result.stdout + result.stderr
    cpu, gpu = texts(tmp_path / "cpu"), texts(tmp_path / "h200x1")
    differing = [key for key in cpu if cpu[key] != gpu[key]]
    assert len(differing) <= 2, f"{len(differing)} of {len(cpu)} rows differ: more than near-ties explain"


def test_sampled_rows_do_not_depend_on_the_batch_up_to_near_ties(tmp_path: Path) -> None:
    for name, seqs in (("wide", 64), ("narrow", 5)):
        result = batchinfer(
            *REQUEST, "hw=h200x1", "sampling.temperature=0.8", f"engine.max_num_seqs={seqs}", f"output.dir={tmp_path / name}"
        )
        assert result.returncode == 0, result.stdout + result.stderr
    wide, narrow = texts(tmp_path / "wide"), texts(tmp_path / "narrow")
    assert sum(wide[key] != narrow[key] for key in wide) <= 2


def test_completions_on_a_gpu_keep_to_their_grammar(tmp_path: Path) -> None:
    choice = "sampling.choice=[yes,no,not at all]"
    result = batchinfer(*REQUEST, "hw=h200x1", "sampling.temperature=1", choice, f"output.dir={tmp_path / 'out'}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(completions(tmp_path / "out")["completion"].to_pylist()) == {"yes", "no", "not at all"}
