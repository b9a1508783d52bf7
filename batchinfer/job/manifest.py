"""The frozen request of a run: its units, its fingerprint, and what made it. manifest.json's existence is the run's existence.

The fingerprint is over `request`: a flat mapping from dotted names to the values that decide results and output columns,
with digests in place of files. It is kept whole, not only hashed, so that a refusal can name every key that differs. Digests
here cost a login node little (sizes, footers, headers); the weights themselves are hashed by the replicas (`check_weights`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from batchinfer.config import RESULT, SCHEMA, Config, ConfigError, flatten, from_dict, leaves
from batchinfer.data.reader import InputSet
from batchinfer.data.schema import SCHEMA_VERSION, RowRange, Shard, Unit
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published, publish_bytes, replace_bytes

PACKAGES = ("batchinfer", "torch", "pyarrow", "tokenizers", "safetensors", "jinja2", "llguidance")
HASH_THREADS, HASH_BYTES = 4, 8 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NOT_NULL = " not null"  # behind the type of an input column that can hold no null in any shard
SHOWN_CHARACTERS = 120  # of a value in a refusal


@dataclass(frozen=True)
class Manifest:
    schema_version: int
    created: str  # UTC, ISO 8601
    config: Config
    input_root: str
    shards: tuple[Shard, ...]
    columns: list[str]  # input columns to carry over
    units: tuple[Unit, ...]
    request: dict[str, Any]
    versions: dict[str, Any]
    git_commit: str | None

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.request)

    @classmethod
    def create(
        cls, run_dir: RunDir, config: Config, inputs: InputSet, columns: list[str], units: Iterable[Unit], request: dict[str, Any]
    ) -> Manifest:
        """Make the run, or find that somebody made it first with the same request. Raises ConfigError for another one.

        config.yaml comes before manifest.json: a run killed between the two does not exist yet, and starts over.
        """
        run_dir.create()
        ours = cls(
            SCHEMA_VERSION,
            datetime.now(UTC).isoformat(timespec="seconds"),
            config,
            str(inputs.root),
            inputs.shards,
            columns,
            tuple(units),
            request,
            versions(),
            git_commit(),
        )
        if not run_dir.manifest_json.exists():
            _write_config(run_dir, config)
            if publish_bytes(run_dir.manifest_json, ours._to_json()) is Published.WON:
                return ours
            _write_config(run_dir, cls.load(run_dir).config)
        theirs = cls.load(run_dir)
        theirs.require_same(request)
        return theirs

    @classmethod
    def load(cls, run_dir: RunDir) -> Manifest:
        """Raises ConfigError when there is no run, or one whose format this program does not know."""
        try:
            raw = json.loads(run_dir.manifest_json.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"run directory {run_dir.root} has no manifest.json; give a folder that a run has made") from error
        except ValueError as error:
            raise ConfigError(f"{run_dir.manifest_json}: damaged, it is only ever published whole ({error})") from error
        if raw["schema_version"] != SCHEMA_VERSION:
            made = f"run directory {run_dir.root} was made with schema version {raw['schema_version']}"
            commit = f" (commit {raw['git_commit'][:12]})" if raw.get("git_commit") else ""
            raise ConfigError(f"{made}, this program knows {SCHEMA_VERSION}; use the version of batchinfer that made it{commit}")
        raw["config"] = from_dict(raw["config"])
        raw["shards"] = tuple(Shard(*shard) for shard in raw["shards"])
        raw["units"] = tuple(tuple(RowRange(*r) for r in unit) for unit in raw["units"])
        return cls(**raw)

    def require_same(self, other_request: dict[str, Any]) -> None:
        """Raises ConfigError that lists every key in which the other request differs, with the frozen and the new value."""
        keys = [*self.request, *(key for key in other_request if key not in self.request)]
        old, new = _plain(self.request), _plain(other_request)
        pairs = [(key, old.get(key), new.get(key)) for key in keys]
        differing = [f"{key} was {_show(then)}, now {_show(now)}" for key, then, now in pairs if then != now]
        if differing:
            frozen = "this run is frozen with another request: " + "; ".join(differing)
            raise ConfigError(f"{frozen}; put it back, or choose another run_name or output.dir")

    def _to_json(self) -> bytes:
        fields = dict(vars(self))
        fields["config"] = self.config.to_dict()
        fields["shards"] = [[s.path, s.size, s.num_rows, s.footer] for s in self.shards]
        fields["units"] = [[[r.shard, r.start, r.stop] for r in unit] for unit in self.units]
        fields["request"] = _plain(self.request)
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def request_of(config: Config, shards: Sequence[Shard], schema: pa.Schema) -> dict[str, Any]:
    """What decides results and output columns, flat. Reads the checkpoint's small files and headers when there is one."""
    values = flatten(config)
    request = {name: values[name] for name, f in leaves() if f.metadata["kind"] in (RESULT, SCHEMA)}
    request["model.chat_template"] = _template(config.model.chat_template)
    request["output.schema_version"] = SCHEMA_VERSION
    request["input.shards"] = _describe(shards)
    request["input.schema"] = [f"{field.name}: {field.type}{'' if field.nullable else NOT_NULL}" for field in schema]
    return request | checkpoint_digests(config.model.path)


def fingerprint_of(request: Any) -> str:
    """sha256 of the request as canonical JSON."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checkpoint_digests(path: str | Path | None) -> dict[str, str | None]:
    """Digests of a checkpoint folder by what they stand for; None for what is not there. Cheap: no weight is read."""
    folder = None if path is None else Path(path)
    return {
        "model.weights_headers": _header_digest(folder),
        "model.tokenizer": _files_digest(folder, *TOKENIZER_FILES),
        "model.chat_template_file": _files_digest(folder, *_chat_template_files(folder)),
        "model.config_json": _files_digest(folder, "config.json", "generation_config.json"),
    }


class OtherWeights(RuntimeError):
    """A checkpoint is not the one that the run began with."""


def hash_weights(path: str | Path) -> dict[str, str]:
    """sha256 of every weight file's content, by file name."""
    files = _weight_files(Path(path))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip([file.name for file in files], pool.map(_content_hash, files), strict=True))


def check_weights(run_dir: RunDir, hashes: dict[str, str]) -> None:
    """Record the weights that this run works with, or compare with what is recorded. Raises OtherWeights naming the file."""
    if publish_bytes(run_dir.weights_json, json.dumps(hashes, indent=1).encode()) is Published.WON:
        return
    recorded = json.loads(run_dir.weights_json.read_bytes())
    for name in sorted(recorded.keys() | hashes.keys()):
        if recorded.get(name) != hashes.get(name):
            then, now = recorded.get(name, "absent"), hashes.get(name, "absent")
            raise OtherWeights(f"weight file {name} is not the one that this run began with (sha256 was {then}, now {now})")


def versions() -> dict[str, Any]:
    """Of Python and of the packages that results may depend on; None for one that is not installed. Imports none of them."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Commit of the checkout that this package lies in, with -dirty behind it when tracked files differ from it; None for an
    installed package or without git."""
    checkout = Path(__file__).resolve().parents[2]
    try:
        if Path(_git(checkout, "rev-parse", "--show-toplevel")) != checkout:
            return None
        return _git(checkout, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(checkout: Path, *words: str) -> str:
    command = ["git", "-C", str(checkout), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_config(run_dir: RunDir, config: Config) -> None:
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    replace_bytes(run_dir.config_yaml, text.encode(), durable=True)


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    """As it will be when read back: JSON knows lists, not tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(request))
    return plain


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... (sha256 {fingerprint_of(value)[:16]})"


def _describe(shards: Sequence[Shard]) -> str:
    """Counts for people, a digest over everything for comparison."""
    digest = fingerprint_of([[s.path, s.size, s.num_rows, s.footer] for s in shards])
    return f"{len(shards):,} shards, {sum(s.num_rows for s in shards):,} rows, sha256 {digest}"


def _template(override: str | None) -> str | None:
    """A template given as a file counts by its content."""
    if override is not None and "\n" not in override and os.path.isfile(override):
        return Path(override).read_text("utf-8")
    return override


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _header_digest(folder: Path | None) -> str | None:
    """Over name, size, and header of each weight file: 8 bytes of little-endian length, then JSON (safetensors format)."""
    files = [] if folder is None else _weight_files(folder)
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            prefix = file.read(8)
            size = os.fstat(file.fileno()).st_size
            header = file.read(min(int.from_bytes(prefix, "little"), size))
        digest.update(f"{path.name} {size}\n".encode() + prefix + header)
    return digest.hexdigest() if files else None


def _files_digest(folder: Path | None, *names: str) -> str | None:
    found = [] if folder is None else [folder / name for name in names if (folder / name).is_file()]
    digest = hashlib.sha256()
    for path in found:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest() if found else None


def _chat_template_files(folder: Path | None) -> list[str]:
    named = [] if folder is None else sorted(folder.glob("additional_chat_templates/*.jinja"))
    return ["chat_template.jinja", *(f"additional_chat_templates/{path.name}" for path in named)]


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
