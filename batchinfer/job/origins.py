"""Is what a run was made from still there and unchanged: its input shards, its checkpoint, its recorded request.

Cheap evidence first: sizes, Parquet footers, headers and small files. Weights are read only when asked (`deep`). What has been
moved away is no problem, but is said (`not_compared`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from batchinfer.config import ConfigError, flatten, from_dict
from batchinfer.data.reader import InputChanged, require_unchanged
from batchinfer.job.manifest import Manifest, checkpoint_digests, hash_weights
from batchinfer.job.rundir import RunDir

THREADS = 16  # footers wait for the file system


class Origins:
    """One look at them. `unchanged`: numbers of the shards that are still what was planned."""

    def __init__(self, run_dir: RunDir, manifest: Manifest):
        self._run_dir, self._manifest = run_dir, manifest
        with ThreadPoolExecutor(THREADS) as pool:
            complaints = list(pool.map(self._complaint, range(len(manifest.shards))))
        self._changed = [text for text in complaints if text]
        self.unchanged = {number for number, text in enumerate(complaints) if text is None}

    def _complaint(self, number: int) -> str | None:
        """None: as planned; empty: gone."""
        shard = self._manifest.shards[number]
        path = Path(self._manifest.input_root) / shard.path
        if not path.exists():
            return ""
        try:
            require_unchanged(path, shard)
        except InputChanged as error:
            return f"input shard {shard.path}: {error}"
        return None

    def problems(self, deep: bool) -> Iterator[str]:
        """One line for each thing that differs. `deep`: also the content of the weights."""
        yield from self._changed
        yield from self._config_problems()
        path = self._manifest.config.model.path
        if path is None or not Path(path).exists():
            return
        for key, digest in checkpoint_digests(path).items():
            if digest != self._manifest.request.get(key):
                yield f"{key}: the files in {path} are not those that the run was planned with"
        if deep and self._run_dir.weights_json.exists():
            yield from self._weight_problems(path)

    def _config_problems(self) -> Iterator[str]:
        try:
            found = flatten(from_dict(yaml.safe_load(self._run_dir.config_yaml.read_bytes())))
        except (OSError, yaml.YAMLError, ConfigError) as error:
            yield f"config.yaml: cannot be read ({' '.join(str(error).split())})"
            return
        for name, value in flatten(self._manifest.config).items():
            if found[name] != value:
                yield f"config.yaml: {name} is {found[name]!r}, and {value!r} in manifest.json"

    def _weight_problems(self, path: str) -> Iterator[str]:
        recorded, found = json.loads(self._run_dir.weights_json.read_bytes()), hash_weights(path)
        for name in sorted(recorded.keys() | found.keys()):
            if recorded.get(name) != found.get(name):
                yield f"weights: {path}/{name} is not what the run was made with, or is not there"


def not_compared(run_dir: RunDir) -> str | None:
    """One sentence when input shards are gone, so that `verify` cannot compare their rows with the input; else None."""
    manifest = Manifest.load(run_dir)
    root, shards = Path(manifest.input_root), manifest.shards
    gone = [shard.path for shard in shards if not (root / shard.path).exists()]
    if not gone:
        return None
    return (
        f"{len(gone):,} of {len(shards):,} input shards are not there any more (the first: {root / gone[0]}); "
        "their units are not compared with the input"
    )
