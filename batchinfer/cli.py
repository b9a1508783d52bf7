"""The command line: `python -m batchinfer VERB ...`, where everything but a run directory is a Hydra override.

Exit codes: 0 every row is committed; 1 work failed, rows are missing, or `verify` found a difference; 2 the request is wrong
(one sentence on stderr); 130 interrupted. A verb imports what it needs when it runs, so that `status` starts at once.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchinfer.checks import valid_range
from batchinfer.config import Config, ConfigError, flatten, leaves, show

if TYPE_CHECKING:
    from batchinfer.job.rundir import RunDir

# What may differ between two submissions of one run: groups and keys that change no completion and no column.
MAY_CHANGE = ("hw", "launcher", "engine", "stats_every", "verbose", "max_error_fraction", "model.path", "input.paths")
HELP_FLAGS = ("--help", "-h")
HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--resolve", "--hydra-help")
HYDRA_CHOICES = {
    ("--cfg", "-c"): ("job", "hydra", "all"),
    ("--info", "-i"): ("", "all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
INTERRUPTED = 130
WHOLE = "every row is there exactly once, and every hash is right"


@dataclass(frozen=True)
class Verb:
    run: Callable[[list[str]], int]
    usage: str
    help: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code. The console script and `__main__` call it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        name, rest = _verb(arguments)
        if any(flag in rest for flag in HELP_FLAGS):
            return _help(name)
        return VERBS[name].run(rest)
    except ConfigError as error:
        print(f"batchinfer: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"batchinfer: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("batchinfer: interrupted", file=sys.stderr)
        return INTERRUPTED


def _verb(arguments: list[str]) -> tuple[str, list[str]]:
    """The first word is the verb unless it is an override or a flag; then the verb is run."""
    first = arguments[0] if arguments else ""
    if first in VERBS:
        return first, arguments[1:]
    if first and "=" not in first and not first.startswith(("-", "~", "+")):
        close = difflib.get_close_matches(first, VERBS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"{first}: neither a verb nor key=value; {hint}verbs: {', '.join(VERBS)}")
    return "run", arguments


def _run(arguments: list[str]) -> int:
    from batchinfer.compose import compose, expand_multirun

    flags, overrides = _split(arguments, ("--multirun", "-m", *HYDRA_FLAGS))
    if any(flag.split("=")[0] in HYDRA_FLAGS for flag in flags):
        return _show_config(arguments)
    codes = [0]
    for combination in expand_multirun(overrides) if flags else [overrides]:
        codes.append(_submit(compose(combination)))
        if codes[-1] == INTERRUPTED:
            break
    return max(codes)


def _submit(config: Config, before: Callable[[RunDir], bool] = lambda run_dir: True) -> int:
    """Freezes the plan, or finds it frozen, and places the jobs, unless `before` finds nothing to do. What cannot be placed
    leaves nothing behind."""
    from batchinfer.job.launch import check_placeable, resolve_kind, run_job
    from batchinfer.job.plan import freeze, make_plan

    plan = make_plan(config)
    here = plan.submission()
    check_placeable(resolve_kind(here), here)
    run_dir = freeze(plan)
    return run_job(run_dir, here, expected=plan.expected()) if before(run_dir) else 0


def _resume(arguments: list[str]) -> int:
    run_dir, words = _take_run_dir("resume", arguments)
    return _submit(_overlaid(run_dir, words, MAY_CHANGE))


def _retry(arguments: list[str]) -> int:
    run_dir, words = _take_run_dir("retry", arguments)
    config = _overlaid(run_dir, words, (*MAY_CHANGE, "retry"))
    from batchinfer.job.retry import Goal, begin, describe, errors_in

    wanted: dict[int, Goal] = {}

    def before(run_dir: RunDir) -> bool:
        wanted.update(begin(run_dir, config.retry.codes))
        print(describe(run_dir, wanted), flush=True)
        return bool(wanted)

    code = _submit(config, before)
    rows, left = sum(goal.rows for goal in wanted.values()), errors_in(run_dir, wanted)
    if wanted and (code != 0 or config.launcher.wait):
        print(f"retry: {rows - left:,} of {rows:,} error rows have a completion now", flush=True)
    return code


def _overlaid(run_dir: RunDir, words: list[str], may_change: Sequence[str]) -> Config:
    """The frozen config of a run with overrides on top."""
    _, overrides = _split(words, ())
    from batchinfer.compose import overlay
    from batchinfer.job.manifest import Manifest

    frozen = Manifest.load(run_dir).config
    here = replace(frozen, output=replace(frozen.output, dir=str(run_dir.root)))  # the folder may have moved
    return overlay(here, overrides, may_change)


def _plan(arguments: list[str]) -> int:
    from batchinfer.compose import compose
    from batchinfer.job.outlook import show as show_plan
    from batchinfer.job.plan import make_plan

    _, overrides = _split(arguments, ())
    plan = make_plan(compose(overrides, planning=True), sample=True)
    show_plan(plan)
    if not plan.fitted.memory.fits:
        sys.stdout.flush()  # before the sentence, where both go to one file
        raise ConfigError(plan.fitted.memory.explain())
    return 0


def _status(arguments: list[str]) -> int:
    run_dir, words = _take_run_dir("status", arguments)
    flags = _only_flags("status", words, ("--watch",))
    from batchinfer.display import status

    return status(run_dir, bool(flags))


def _report(arguments: list[str]) -> int:
    run_dir, words = _take_run_dir("report", arguments)
    _only_flags("report", words, ())
    from batchinfer.report import report

    return report(run_dir)


def _verify(arguments: list[str]) -> int:
    run_dir, words = _take_run_dir("verify", arguments)
    flags = _only_flags("verify", words, ("--quick", "--deep"))
    if len(set(flags)) > 1:
        raise ConfigError("--quick --deep: at most one of them")
    from batchinfer.job.origins import not_compared
    from batchinfer.job.verify import verify

    note = not_compared(run_dir)
    if note:
        print(f"note: {note}", flush=True)
    problems = verify(run_dir, quick="--quick" in flags, deep="--deep" in flags)
    what = "every unit is there, and every file is what was written" if "--quick" in flags else WHOLE
    print("\n".join(problems) or f"{run_dir.root}: {what}")
    return 1 if problems else 0


def _export(arguments: list[str]) -> int:
    run_dir, words = _take_run_dir("export", arguments)
    named = next((word for word in words if not word.startswith("-") and "=" not in word), None)
    if named is None:
        raise ConfigError(f"export: DEST is missing; usage: python -m batchinfer {VERBS['export'].usage}")
    words.remove(named)
    config = _overlaid(run_dir, words, ("export",))
    from batchinfer.job.export import ExportFailed, export

    try:
        done = export(run_dir, Path(named).absolute(), config.export)
    except ExportFailed as error:
        print(f"batchinfer: {error}", file=sys.stderr)
        return 1
    print(f"{named}: {done.files:,} files, {done.rows:,} rows, {done.samples:,} samples")
    return 0


def _cancel(arguments: list[str]) -> int:
    run_dir, words = _take_run_dir("cancel", arguments)
    _only_flags("cancel", words, ())
    from batchinfer.job.launch import cancel_jobs

    newest = max((int(folder.name) for folder in run_dir.submissions.iterdir() if folder.name.isdecimal()), default=0)
    run_dir.cancel(newest)
    cancel_jobs(run_dir)
    print(f"{run_dir.root}: cancelled up to submission {newest}; `resume` starts a new one")
    return 0


def _profile(arguments: list[str]) -> int:
    from batchinfer.compose import compose

    _, overrides = _split(arguments, ())
    config = compose(overrides)
    from batchinfer.profiling import profile

    return profile(config, overrides)


def _bench(arguments: list[str]) -> int:
    _, overrides = _split(arguments, ())
    from batchinfer.bench.command import bench
    from batchinfer.compose import compose

    return bench(compose(overrides), overrides)


VERBS = {
    "run": Verb(
        _run,
        "[run] [group=choice ...] [key=value ...] [--multirun]",
        "run a request, or go on with it; without arguments: the shipped model over the shipped sample",
    ),
    "resume": Verb(_resume, "resume RUN_DIR [overrides]", f"finish what is missing; may change: {', '.join(MAY_CHANGE)}"),
    "retry": Verb(_retry, "retry RUN_DIR [retry.codes=[...]] [overrides]", "run the error rows again, into the same run"),
    "plan": Verb(_plan, "plan [overrides]", "what would happen: memory, layout, time, GPU-hours; needs no GPU and no checkpoint"),
    "status": Verb(_status, "status RUN_DIR [--watch]", "how far a run is"),
    "report": Verb(_report, "report RUN_DIR", "summary.json and a table"),
    "verify": Verb(
        _verify,
        "verify RUN_DIR [--quick | --deep]",
        "check that every input row came out exactly once, unchanged; quick: only the files' hashes; deep: the weights' too",
    ),
    "export": Verb(
        _export,
        "export RUN_DIR DEST [export.format=jsonl] [export.incomplete=true]",
        "one output file for each input shard, in input order",
    ),
    "cancel": Verb(_cancel, "cancel RUN_DIR", "stop every job of a run"),
    "profile": Verb(_profile, "profile [overrides]", "where the time of a step goes: a trace and a table"),
    "bench": Verb(
        _bench, "bench [overrides]", "time the engine on defined work, beside the hardware's limit, HF transformers and vLLM"
    ),
}


def _split(arguments: list[str], known_flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags, overrides). Raises ConfigError for a flag that is not among `known_flags`."""
    flags = [word for word in arguments if word.startswith("-")]
    for flag in flags:
        if flag.split("=")[0] not in known_flags:
            raise ConfigError(f"{flag}: no such flag here; flags: {', '.join([*known_flags, *HELP_FLAGS])}")
    return flags, [word for word in arguments if not word.startswith("-")]


def _only_flags(verb: str, words: list[str], known_flags: Sequence[str]) -> list[str]:
    flags, others = _split(words, known_flags)
    if others:
        raise ConfigError(f"{' '.join(others)}: too much for {verb}; usage: python -m batchinfer {VERBS[verb].usage}")
    return flags


def _take_run_dir(verb: str, arguments: list[str]) -> tuple[RunDir, list[str]]:
    """The run that the first word which is no flag names, and the other words."""
    from batchinfer.job.rundir import RunDir

    named = next((word for word in arguments if not word.startswith("-")), None)
    if named is None or ("=" in named and not Path(named).exists()):
        raise ConfigError(f"{verb}: RUN_DIR is missing; usage: python -m batchinfer {VERBS[verb].usage}")
    run_dir = RunDir(Path(named).absolute())
    if not run_dir.manifest_json.is_file():
        raise ConfigError(f"{named}: not a run directory: it must hold a manifest.json, as outputs/<run_name> does")
    arguments.remove(named)
    return run_dir, arguments


def _show_config(arguments: list[str]) -> int:
    """--cfg, --info and their like: Hydra's business, once we know that the overrides are right."""
    from batchinfer.compose import check_overrides, show_with_hydra

    for flags, valid in HYDRA_CHOICES.items():
        _check_flag(arguments, flags, valid)
    check_overrides([word for word in arguments if "=" in word and not word.startswith("-")])
    return show_with_hydra(arguments)


def _check_flag(arguments: list[str], flags: tuple[str, ...], valid: tuple[str, ...]) -> None:
    """Refuses `--cfg foo` and `--cfg=foo`; where the value may be left out ("" is valid), so may it before an override."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, assigned, value = word.partition("=")
        if flag not in flags:
            continue
        if not assigned:
            value = "" if "=" in following or following.startswith("-") else following
        if value not in valid:
            raise ConfigError(f"{f'{flag} {value}'.strip()}: must be {flag} and one of {', '.join(filter(None, valid))}")


def _help(verb: str) -> int:
    """The verb's line; for verbs that take overrides also the groups, from Hydra, and every key."""
    if verb not in ("run", "resume", "retry", "plan", "bench", "profile"):
        print(f"usage: python -m batchinfer {VERBS[verb].usage}\n{VERBS[verb].help}")
        return 0
    from batchinfer.compose import show_with_hydra

    print("usage: python -m batchinfer VERB ...\n")
    print("\n".join(f"  {v.usage}\n      {v.help}" for v in VERBS.values()))
    print("  --cfg job [overrides]\n      print the resolved config and do nothing")
    print("\nConfig groups, chosen as group=choice:\n", flush=True)
    show_with_hydra(["--help"])
    print("Keys, set as key=value (* is part of what a run is, and fixed once it has begun):\n")
    defaults = flatten(Config())
    for name, f in leaves():
        mark = " " if f.metadata["kind"] == "throughput" else "*"
        valid = valid_range(f.metadata)
        print(f"{mark} {show(name, defaults[name])}\n      {f.metadata['help']}{f'; {valid}' if valid else ''}")
    return 0
