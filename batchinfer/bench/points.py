"""Many benches, one after the other, each with its figures in a file of its own: what the scripts in `slurm/` are made of.

A point whose file stands is not run again, so a series goes on where it stopped. One that fails leaves a sentence instead of
figures, and the series goes on; the next time it is tried again. No torch.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import batchinfer
from batchinfer.bench.results import OURS
from batchinfer.config import ConfigError
from batchinfer.job.replica import last_words
from batchinfer.publish import replace_bytes

INTERRUPTED = 130


@dataclass(frozen=True)
class Point:
    """A bench with a name. `found`: its JSON, None where it failed; then `why` is a sentence."""

    name: str
    words: tuple[str, ...]
    found: dict[str, Any] | None = None
    why: str | None = None


def measure(folder: Path, name: str, words: Sequence[str]) -> Point:
    """Runs `bench` with these overrides, unless `folder` has its figures as `<name>.json`.

    ConfigError: the figures that are there came from other overrides.
    """
    file, failed = folder / f"{name}.json", folder / f"{name}.failed"
    if file.exists():
        return Point(name, tuple(words), _kept(file, words))
    print(f"{name}: running", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *_arguments(words)], env=_environment(), capture_output=True, text=True)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode != 0:
        why = _reason(done)
        replace_bytes(failed, f"{why}\n{done.stderr}".encode())
        return Point(name, tuple(words), why=why)
    failed.unlink(missing_ok=True)
    found = _figures(done.stdout)
    replace_bytes(file, json.dumps(found, indent=1).encode())
    return Point(name, tuple(words), found)


def _arguments(words: Sequence[str]) -> list[str]:
    return ["-m", "batchinfer", "bench", *words]


def _environment() -> dict[str, str]:
    """The child finds the package where this process has it, from whichever folder it starts."""
    root = str(Path(batchinfer.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _kept(file: Path, words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_bytes())
    now, then = shlex.join(["python", *_arguments(words)]), found["conditions"]["command"]
    if now != then:
        raise ConfigError(f"{file}: was made by `{then}`, and this would be `{now}`: choose another folder, or remove the file")
    return found


def _figures(stdout: str) -> dict[str, Any]:
    """The last line of a bench."""
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """What our engine said, where the bench came so far; else what the command said."""
    if done.returncode == 1 and done.stdout.strip():
        return str(_figures(done.stdout)["failures"].get(OURS, "our engine has no figures"))
    return last_words(done.stderr) or f"exit code {done.returncode} without a word"
