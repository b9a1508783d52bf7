"""The weight files of a checkpoint: which of them holds which tensor, and whether they are there and whole. No torch.

Only headers are read, so a login node can look before anything is queued, and ranks look in the same way before they load.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from pathlib import Path

from batchinfer.config import ConfigError
from batchinfer.model.safetensors_file import NotSafetensors, SafetensorsFile

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def files_by_tensor(folder: Path) -> dict[str, Path]:
    """Which file of a checkpoint holds which tensor. Raises ConfigError, and OSError for a file that cannot be read."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        try:
            return {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is not an index of safetensors: it must be JSON with a weight_map") from None
    if not single.exists():
        raise ConfigError(f"model.path={folder} holds neither {SINGLE} nor {INDEX}: only safetensors checkpoints can be loaded")
    with contextlib.closing(open_weights(single)) as file:
        return dict.fromkeys(file.tensors, single)


def open_weights(path: Path) -> SafetensorsFile:
    """Raises ConfigError for a file that is missing or not whole, and OSError for one that cannot be read."""
    try:
        return SafetensorsFile(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: the checkpoint's index names it") from None
    except NotSafetensors as error:
        raise cut_short(path, error) from None


def cut_short(path: Path, error: NotSafetensors) -> ConfigError:
    return ConfigError(f"{path} is not a safetensors file, or it is cut short: {error}")


def lacks(path: Path, name: str) -> ConfigError:
    return ConfigError(f"{path} lacks {name}, which the checkpoint's index says it holds")


def check_files(folder: Path) -> None:
    """Raises what a rank would before it reads the first weight: a file is missing, not whole, or lacks what the index says."""
    wanted: dict[Path, list[str]] = defaultdict(list)
    for name, path in files_by_tensor(folder).items():
        wanted[path].append(name)
    for path, names in sorted(wanted.items()):
        with contextlib.closing(open_weights(path)) as file:
            for name in names:
                if name not in file.tensors:
                    raise lacks(path, name)
