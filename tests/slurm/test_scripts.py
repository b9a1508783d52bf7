"""The shell scripts: they parse, and each runs its verb on two processes of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])
SHORT = ["input.limit=4", "sampling.max_tokens=2", "run_name=mine"]


def call(folder: Path, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in `folder`, whose own programs come first on the PATH."""
    env = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        **environment,
    }
    return subprocess.run([ROOT / "slurm" / script, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_stop_at_errors_and_say_how_they_are_used(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash" and lines[1].startswith("# ") and "set -euo pipefail" in lines
    assert os.access(script, os.X_OK) and '"$@"' in lines[-1]


def test_there_is_a_script_for_each_way() -> None:
    assert [script.name for script in SCRIPTS] == ["local_2gpu.sh", "node_4gpu.sbatch", "profile_2gpu.sh"]


def test_a_local_run_of_two_ranks(tmp_path: Path) -> None:
    done = call(tmp_path, "local_2gpu.sh", *SHORT, HW="cpu")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "outputs/mine/completions").iterdir())
    (replica,) = (tmp_path / "outputs/mine/replicas").iterdir()
    assert len({file.parent.name for file in replica.glob("ranks/**/stdout.log")}) == 2


def test_a_node_by_sbatch(tmp_path: Path) -> None:
    """sbatch runs the script with bash and its arguments; a step of one task is the command itself."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\necho "$1 $2" > srun.txt\nshift 2\nexec "$@"\n')
    srun.chmod(0o755)
    done = call(tmp_path, "node_4gpu.sbatch", *SHORT, "hw.gpus_per_node=2", HW="cpu", SLURM_CPUS_PER_TASK="2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "srun.txt").read_text() == "--ntasks=1 --cpus-per-task=2\n"
    assert list((tmp_path / "outputs/mine/completions").iterdir())


def test_a_profile_of_two_ranks(tmp_path: Path) -> None:
    lengths = ["profile.num_seqs=2", "profile.prompt_tokens=16", "profile.output_tokens=16"]
    done = call(tmp_path, "profile_2gpu.sh", *lengths, "profile.steps=2", "profile.warmup_steps=1", HW="cpu", NSYS="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs/profile-tiny/trace.json.gz").exists() and '"tensor_parallel": 2' in done.stdout


def test_without_nsys_the_profile_says_so(tmp_path: Path) -> None:
    done = call(tmp_path, "profile_2gpu.sh", HW="cpu", PATH="/nowhere:/bin:/usr/bin")
    assert done.returncode == 1 and done.stderr.startswith("profile_2gpu.sh: nsys (Nsight Systems) is not on the PATH:")
    assert done.stderr.count("\n") == 1
