"""From overrides on the command line to a checked Config: the one module that knows Hydra and OmegaConf.

Hydra merges the files of `conf/` over the schema's defaults. Everything a user can get wrong is found here first, so that an
error is one of our sentences. Hydra is imported inside the functions: verbs that compose nothing start without it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchinfer import hardware, topology
from batchinfer.config import RESULT, SCHEMA, Config, ConfigError, flatten, from_dict, leaves, show, unknown_key

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PACKAGE = Path(__file__).resolve().parent
JSON_KEYS = [name for name, f in leaves() if f.metadata.get("as_json")]
SHIPPED = "pkg://batchinfer/"  # a path that starts so lies inside the package, wherever it is installed


def conf_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it when installed."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


def group_choices() -> dict[str, list[str]]:
    """Every config group with the names of its files."""
    groups = sorted(folder for folder in conf_dir().iterdir() if folder.is_dir() and any(folder.glob("*.yaml")))
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in groups}


def compose(overrides: Sequence[str], planning: bool = False) -> Config:
    """The checked config of Hydra overrides, with its run name, output folder and paths filled in. Raises ConfigError.

    `planning`: weights are not needed, so model.architecture may stand for a checkpoint.
    """
    raw, choices = _compose_raw([_checked(parsed) for parsed in _parse(overrides)])
    config = _read_schema(from_dict(raw, planning))
    name = config.run_name or f"{choices['model']}-{_digest(config)}"
    output = replace(config.output, dir=config.output.dir or f"outputs/{name}")
    profile = replace(config.profile, dir=config.profile.dir or f"outputs/profile-{choices['model']}")
    return _locate(replace(config, run_name=name, output=output, profile=profile))


def overlay(config: Config, overrides: Sequence[str], may_change: Sequence[str]) -> Config:
    """`config` with overrides on top, as far as `may_change` (groups and dotted keys) allows. Raises ConfigError.

    A group choice (hw=a100x4) replaces the whole group; a single key replaces that key.
    """
    parsed = _parse(overrides)
    for override in parsed:
        key = _checked(override).key_or_group
        if key not in may_change and key.split(".")[0] not in may_change:
            raise ConfigError(f"{override.input_line}: cannot change when a run is resumed; what may: {', '.join(may_change)}")
    base, new = config.to_dict(), _compose_raw(parsed)[0]
    for override in parsed:
        _take(base, new, override)
    return _locate(from_dict(base))


def _take(base: dict[str, Any], new: dict[str, Any], override: Override) -> None:
    """Copies what one override set from the freshly composed values to `base`."""
    *groups, key = override.key_or_group.split(".")
    for group in groups:
        base, new = base[group], new[group]
    value = override.value()
    if groups and isinstance(value, Mapping):
        base[key] = {**base[key], **{str(name): new[key][str(name)] for name in value}}
    else:
        base[key] = new[key]


def expand_multirun(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each combination of a sweep (a,b or range() or choice()), in order, each with a run name of its own.

    Raises ConfigError, also when combinations would share a folder because output.dir is given.
    """
    columns = [_values(override) for override in _parse(overrides)]
    combinations = [list(combination) for combination in itertools.product(*columns)]
    configs = [compose(combination) for combination in combinations]
    if len({config.run_name for config in configs}) < len(configs):
        combinations = [
            _renamed(combination, f"{config.run_name}_{i}")
            for i, (combination, config) in enumerate(zip(combinations, configs, strict=True))
        ]
        configs = [compose(combination) for combination in combinations]
    if len({config.output.dir for config in configs}) < len(configs):
        raise ConfigError(
            f"{show('output.dir', configs[0].output.dir)}: each combination of --multirun needs its own folder; "
            "leave output.dir out and set run_name"
        )
    return combinations


def _renamed(overrides: list[str], run_name: str) -> list[str]:
    return [text for text in overrides if not text.startswith("run_name=")] + [f"run_name='{run_name}'"]


def _values(override: Override) -> list[str]:
    if override.is_discrete_sweep():
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    return [str(override.input_line)]


def _parse(overrides: Sequence[str]) -> list[Override]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(_with_json_quoted(text)))
        except HydraException:
            raise ConfigError(
                f"{text}: must be key=value or group=choice; quote a value that holds spaces, "
                "commas, brackets, equals signs or letters beyond ASCII: 'key=\"value\"'"
            ) from None
    return parsed


def _with_json_quoted(text: str) -> str:
    """Hydra's mappings have no names in quotes: a JSON object becomes a text, where a key takes one."""
    from hydra.core.override_parser.types import Quote, QuotedString

    key, _, value = text.partition("=")
    if key.lstrip("+") not in JSON_KEYS or not value.startswith("{"):
        return text
    try:
        json.loads(value)
    except ValueError:
        return text
    return f"{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"


def _checked(override: Override) -> Override:
    """Refuses what Hydra would refuse in words of its own, and what this program gives no meaning."""
    text, key, value = str(override.input_line), override.key_or_group, override._value
    if override.is_delete() or override.package is not None or key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"{text}: must be key=value or group=choice; nothing can be deleted, moved or set in Hydra itself")
    if not key:
        raise ConfigError(f"{text}: must be key=value or group=choice")
    choices = group_choices()
    if override.is_sweep_override():
        raise ConfigError(f"{text}: several values need --multirun; quote the value if it is text with a comma")
    if key not in choices:
        _check_key(key)
    elif value not in choices[key]:
        close = difflib.get_close_matches(str(value), choices[key], n=1)
        hint = f"did you mean {key}={close[0]}? " if close else ""
        raise ConfigError(f"{text}: no such choice; {hint}choices of {key}: {', '.join(choices[key])}")
    if override.is_add() and not override.is_force_add() and not _in_mapping(key):
        raise ConfigError(f"{text}: every key exists already; leave out the +")
    return override


def _check_key(name: str) -> None:
    names = [leaf for leaf, _ in leaves()]
    if name in names or _in_mapping(name):
        return
    group = name.split(".")[0] + "."
    prefix = group if any(leaf.startswith(group) for leaf in names) else ""
    siblings = dict.fromkeys(leaf.removeprefix(prefix).split(".")[0] for leaf in names if leaf.startswith(prefix))
    raise unknown_key(name, prefix, list(siblings))


def _in_mapping(name: str) -> bool:
    """Whether `name` is a key that holds free names, or an entry of one: hw.env, hw.env.NCCL_DEBUG."""
    return any(f"{name}.".startswith(leaf + ".") and str(f.type).startswith("dict") for leaf, f in leaves())


def _compose_raw(parsed: Sequence[Override]) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain nested values, and which choice each group has."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    raw: Any
    lines = [_forced(override) for override in parsed]
    try:
        with _hydra():
            composed = hydra_compose("config", lines, return_hydra_config=True)
            choices = dict(composed.hydra.runtime.choices)
            plain = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            raw = OmegaConf.to_container(plain, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(lines) or 'conf'}: {' '.join(str(error).split())}") from None
    if raw["hw"]["gpu"] == "auto":
        _add_links(raw["hw"])
    return raw, choices


def _add_links(hw: dict[str, Any]) -> None:
    """How this host's GPUs are linked, as far as the request does not say it. What is wrong with that is found later."""
    links = topology.visible_links()
    hw["interconnect"] = hw["interconnect"] or topology.interconnect(links)
    if isinstance(hw["env"], dict):
        hw["env"] = topology.nccl_environment(links) | hw["env"]


def _forced(override: Override) -> str:
    """Entries of mappings are new to Hydra unless they are added by force."""
    line = str(override.input_line)
    return f"++{line.lstrip('+')}" if _in_mapping(override.key_or_group) else line


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    from hydra import initialize_config_dir

    _register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="batchinfer"):
        yield


def _register() -> None:
    """Makes the schema's defaults and our resolver known to Hydra."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config().to_dict())
    OmegaConf.register_new_resolver("host_gpus", lambda: max(1, len(hardware.visible_gpus())), replace=True)


def _digest(config: Config) -> str:
    """Names a request by what it asks for; two requests that differ in results have different default names."""
    kinds = {name: f.metadata["kind"] for name, f in leaves()}
    asked = {
        name: value
        for name, value in flatten(config).items()
        if kinds[name] in (RESULT, SCHEMA) or name in ("input.paths", "model.path")
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]


def _locate(config: Config) -> Config:
    """Paths made absolute, so that the run can be resumed from another working directory."""
    model = replace(config.model, path=None if config.model.path is None else _absolute(config.model.path))
    return replace(config, model=model, input=replace(config.input, paths=[_absolute(path) for path in config.input.paths]))


def _read_schema(config: Config) -> Config:
    """A JSON schema given as a file counts by its content, and is frozen with it. Raises ConfigError for no such file."""
    schema = config.sampling.json_schema
    if schema is None or "{" in schema:
        return config
    try:
        text = Path(str(schema)).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{show('sampling.json_schema', schema)}: neither a mapping nor JSON text, nor a file that can be read"
        ) from error
    return replace(config, sampling=replace(config.sampling, json_schema=text))


def _absolute(path: str) -> str:
    if path.startswith(SHIPPED):
        return str(PACKAGE / path.removeprefix(SHIPPED))
    return str(Path(path).expanduser().absolute())


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuses overrides that name no key or no choice. Raises ConfigError."""
    for override in _parse(overrides):
        _checked(override)


def show_with_hydra(arguments: Sequence[str]) -> int:
    """Hands --help, --cfg, --info and their like to Hydra, on our config. Returns its exit code."""
    import logging

    import hydra

    logging.raiseExceptions = False  # Hydra shows things through logging, which would trace a pipe that `head` has closed

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def nothing(_: Any) -> None:
        """Hydra shows and returns before this would run."""

    _register()
    before, sys.argv = sys.argv, ["batchinfer", *map(_with_json_quoted, arguments)]
    try:
        nothing()
    except SystemExit as stopped:  # Hydra's way to end what shows something
        return int(stopped.code or 0)
    finally:
        sys.argv = before
    return 0
