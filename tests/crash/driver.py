"""Kills a process between any two of the calls that change a run directory, lets another one go on, and checks the run.

Run as a script, in a process of its own that is small and has no threads: every attempt is a fork. A scenario is run again
and again, killed (SIGKILL) before its first call, its second, and so on until it gets through, so no call is left out.
usage: driver.py SCENARIO FOLDER; prints how many kills there were. Any broken promise is an AssertionError.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import ExportConfig, from_dict
from batchinfer.data.columns import columns_to_read
from batchinfer.data.reader import UnitReader, scan_shards
from batchinfer.data.results import RowResult
from batchinfer.data.schema import RowRange
from batchinfer.data.writer import commit_unit, output_schema, unit_footer, unit_table
from batchinfer.job import manifest as manifest_module
from batchinfer.job.claims import ClaimBoard, Identity
from batchinfer.job.export import export
from batchinfer.job.manifest import Manifest, check_weights, request_of
from batchinfer.job.retry import begin, goals
from batchinfer.job.rundir import TEMPORARY, RunDir
from batchinfer.job.verify import verify
from batchinfer.publish import Published
from batchinfer.worker.generations import Generations

WATCHED: tuple[tuple[Any, str], ...] = (
    (os, "open"),
    (os, "write"),
    (os, "fsync"),
    (os, "close"),
    (os, "link"),
    (os, "unlink"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "rmdir"),
    (os, "listdir"),
    (os, "stat"),
    # Arrow's own writes: between them a temporary file is there, and torn.
    (pq.ParquetWriter, "__init__"),
    (pq.ParquetWriter, "write_table"),
    (pq.ParquetWriter, "close"),
)
BAD = [RowResult(error="bad_logits", error_message="it overflowed")]
UNITS = ((RowRange(0, 0, 2),), (RowRange(0, 2, 3), RowRange(1, 0, 2)))


def kill_before_call(number: int) -> None:
    """From now on, watched calls are counted, and the process kills itself instead of making call `number`."""
    count = itertools.count()

    def watch(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in WATCHED:
        setattr(owner, name, watch(getattr(owner, name)))


def in_child(action: Callable[[], None], kill_at: int | None = None) -> bool:
    """Runs `action` in a fork. True when it got through, False when it was killed; anything else is a failure."""
    pid = os.fork()
    if pid == 0:
        exit_code = 1
        try:
            if kill_at is not None:
                kill_before_call(kill_at)
            action()
            exit_code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(exit_code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the child failed, see above"
    return True


def config_of(seed: int = 0, data: str = "data") -> Any:
    return from_dict({"seed": seed, "model": {"path": "/nowhere"}, "input": {"prompt_column": "prompt", "paths": [data]}})


def create_run(folder: Path, seed: int = 0) -> RunDir:
    """Five rows in two shards, cut into two units of which one spans both."""
    run_dir, data = RunDir(folder / "run"), folder / "data"
    if not data.exists():
        data.mkdir()
        for name, rows in (("a", range(3)), ("b", range(3, 5))):
            table = pa.table({"id": list(rows), "prompt": [f"prompt {i}" for i in rows]})
            pq.write_table(table, data / f"{name}.parquet")
    inputs, config = scan_shards([str(data)]), config_of(seed, str(data))
    Manifest.create(run_dir, config, inputs, ["id", "prompt"], UNITS, request_of(config, inputs.shards, inputs.schema))
    return run_dir


class Worker:
    """What a replica does with the run directory, with a sentence in place of a model."""

    def __init__(self, run_dir: RunDir, identity: Identity, stall_timeout_s: float = 1e9):
        self.run_dir, self.manifest = run_dir, Manifest.load(run_dir)
        retried = goals(run_dir)
        self.generations = Generations(run_dir, retried, "")
        generations = {unit: goal.generation for unit, goal in retried.items()}
        self.board = ClaimBoard(run_dir, len(self.manifest.units), identity, stall_timeout_s, goals=generations)
        self.replica = identity.replica
        root = Path(self.manifest.input_root)
        self.schema = pq.read_schema(root / self.manifest.shards[0].path)
        columns = columns_to_read(self.manifest.config.input, self.schema, self.manifest.columns)
        self.reader = UnitReader(root, self.manifest.shards, columns)

    def run(self) -> None:
        while (unit := self.board.claim()) is not None:
            self.commit(unit)
        assert self.board.finished(), f"units {self.board.pending()} are lost for ever"

    def commit(self, unit: int, is_bad: Callable[[int], bool] = lambda index: False) -> Published:
        """`is_bad`: rows, by their place in the unit, that come out as errors."""
        manifest, shards, generation = self.manifest, self.manifest.shards, self.generations.of(unit)
        inputs = self.reader.read(manifest.units[unit])
        keys = [(shards[r.shard].path, row) for r in manifest.units[unit] for row in range(r.start, r.stop)]
        earlier = self.generations.earlier(unit, keys, inputs)
        good = [[RowResult(completion=f"done: {prompt}", finish_reason="stop")] for prompt in inputs["prompt"].to_pylist()]
        results = [BAD if is_bad(index) else row for index, row in enumerate(good)]
        if earlier is not None:
            results = [row if index in earlier.wanted else [] for index, row in enumerate(results)]
        schema = output_schema(self.schema, manifest.columns, manifest.config)
        table = unit_table(inputs.select(manifest.columns), keys, results, manifest.config, self.replica, schema)
        table = table if earlier is None else earlier.merged(table, keys)
        footer = unit_footer(unit, generation, inputs, table, "", self.replica, {}, manifest.fingerprint)
        outcome = commit_unit(self.run_dir, unit, generation, table, footer, "zstd")
        self.run_dir.supersede_unit(unit, generation)
        return outcome


def here(name: str) -> Identity:
    return Identity.here(f"{name}-{os.getpid()}")


def check_complete(run_dir: RunDir, generation: int = 0) -> None:
    """Every row once, and nothing else in the folder once the leftovers of killed writers are cleaned away."""
    assert verify(run_dir) == []
    run_dir.clean_temporaries()
    assert not [path for path in run_dir.root.rglob("*") if TEMPORARY.fullmatch(path.name)]
    units = range(len(Manifest.load(run_dir).units))
    assert sorted(os.listdir(run_dir.completions)) == [run_dir.completion(unit, generation).name for unit in units]
    texts = [text for unit in units for text in pq.read_table(run_dir.completion(unit, generation))["completion"].to_pylist()]
    assert texts == [f"done: prompt {i}" for i in range(len(texts))]


def for_every_kill(
    folder: Path, prepare: Callable[[Path], RunDir], action: Callable[[RunDir], None], check: Callable[[RunDir], None]
) -> int:
    """`action` killed before each of its calls in turn, on a fresh copy of the prepared run; `check` after each."""
    run_dir = prepare(folder)
    pristine = folder / "pristine"
    if run_dir.root.exists():
        shutil.copytree(run_dir.root, pristine)
    for number in itertools.count():
        shutil.rmtree(run_dir.root, ignore_errors=True)
        if pristine.exists():
            shutil.copytree(pristine, run_dir.root)
        survived = in_child(lambda: action(run_dir), kill_at=number)
        check(run_dir)
        if survived:
            return number
    raise AssertionError("unreachable")


def claim_and_commit(folder: Path) -> int:
    def check(run_dir: RunDir) -> None:
        assert all(problem.endswith("rows") and " missing: " in problem for problem in verify(run_dir)), "torn, not only missing"
        assert in_child(lambda: Worker(run_dir, here("second")).run())
        check_complete(run_dir)

    return for_every_kill(folder, create_run, lambda run_dir: Worker(run_dir, here("first")).run(), check)


def without_links(folder: Path) -> int:
    def refuse(*_: Any) -> NoReturn:
        raise OSError(errno.EPERM, "Operation not permitted")

    os.link = refuse
    return claim_and_commit(folder)


def success_reported_as_failure(folder: Path) -> int:
    real = os.link

    def link(source: Any, target: Any) -> NoReturn:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    os.link = link  # type: ignore[assignment]
    return claim_and_commit(folder)


def claim_and_release(folder: Path) -> int:
    def action(run_dir: RunDir) -> None:
        board = Worker(run_dir, here("first")).board
        units = [board.claim(), board.claim()]
        for unit in units:
            assert unit is not None
            board.release(unit)

    def check(run_dir: RunDir) -> None:
        assert in_child(lambda: Worker(run_dir, here("second")).run())
        check_complete(run_dir)

    return for_every_kill(folder, create_run, action, check)


def take_over(folder: Path) -> int:
    """The one who takes over a dead holder's units is killed too, and so a third must finish."""

    def prepare(folder: Path) -> RunDir:
        run_dir = create_run(folder)

        def claim_all() -> None:
            board = Worker(run_dir, here("zeroth")).board
            assert [board.claim(), board.claim()] == [0, 1]

        assert in_child(claim_all)
        return run_dir

    def check(run_dir: RunDir) -> None:
        assert in_child(lambda: Worker(run_dir, here("third")).run())
        check_complete(run_dir)

    return for_every_kill(folder, prepare, lambda run_dir: Worker(run_dir, here("second")).run(), check)


def retry_errors(folder: Path) -> int:
    """Killed from the freezing of the goals to the last move; taken up by another retry."""

    def prepare(folder: Path) -> RunDir:
        run_dir = create_run(folder)

        def make_errors() -> None:
            worker = Worker(run_dir, here("first"))
            while (unit := worker.board.claim()) is not None:
                worker.commit(unit, is_bad=lambda index: index == 1)

        assert in_child(make_errors)
        return run_dir

    def retry(run_dir: RunDir) -> None:
        begin(run_dir, [])
        Worker(run_dir, here("retry")).run()
        run_dir.supersede()

    def check(run_dir: RunDir) -> None:
        assert verify(run_dir) == [], "a done unit was undone for a moment"
        assert in_child(lambda: retry(run_dir))
        check_complete(run_dir, generation=1)
        assert sorted(os.listdir(run_dir.superseded)) == ["000000.0.parquet", "000001.0.parquet"]
        assert in_child(lambda: retry(run_dir))
        check_complete(run_dir, generation=1)

    return for_every_kill(folder, prepare, retry, check)


def export_shards(folder: Path) -> int:
    """The folder is there and whole, or not there; and the next export clears away what a killed one left."""
    dest = folder / "dest"

    def prepare(folder: Path) -> RunDir:
        run_dir = create_run(folder)
        assert in_child(lambda: Worker(run_dir, here("first")).run())
        return run_dir

    def run_export(run_dir: RunDir) -> None:
        export(run_dir, dest, ExportConfig())

    def check(run_dir: RunDir) -> None:
        if not dest.exists():
            assert in_child(lambda: run_export(run_dir))
        texts = [pq.read_table(dest / f"{shard}.parquet")["completion"].to_pylist() for shard in "ab"]
        assert texts == [[f"done: prompt {i}" for i in rows] for rows in (range(3), range(3, 5))]
        shutil.rmtree(dest)
        assert in_child(lambda: run_export(run_dir))
        assert sorted(os.listdir(folder)) == ["data", "dest", "pristine", "run"], "something is left"
        shutil.rmtree(dest)
        check_complete(run_dir)

    return for_every_kill(folder, prepare, run_export, check)


def create_manifest(folder: Path) -> int:
    def action(run_dir: RunDir) -> None:
        create_run(folder, seed=1)

    def prepare(folder: Path) -> RunDir:
        run_dir = create_run(folder)
        shutil.rmtree(run_dir.root)
        return run_dir

    def check(run_dir: RunDir) -> None:
        seed = 1 if run_dir.manifest_json.exists() else 2  # killed before it existed: another request may start over
        create_run(folder, seed)
        assert Manifest.load(run_dir).config.seed == seed and f"seed: {seed}\n" in run_dir.config_yaml.read_text()

    return for_every_kill(folder, prepare, action, check)


def small_files(folder: Path) -> int:
    """The stop mark and the record of the weights: old or new, never half."""

    def action(run_dir: RunDir) -> None:
        run_dir.cancel(1)
        run_dir.cancel(2)
        check_weights(run_dir, {"model.safetensors": "00"})

    def check(run_dir: RunDir) -> None:
        stopped = [run_dir.is_cancelled(number) for number in (1, 2, 3)]
        assert stopped in ([False, False, False], [True, False, False], [True, True, False])
        check_weights(run_dir, {"model.safetensors": "00"})

    return for_every_kill(folder, create_run, action, check)


SCENARIOS = (
    claim_and_commit,
    without_links,
    success_reported_as_failure,
    claim_and_release,
    take_over,
    retry_errors,
    export_shards,
    create_manifest,
    small_files,
)

if __name__ == "__main__":
    manifest_module.git_commit = lambda: None  # no part of the promise, and slow
    scenario = next(function for function in SCENARIOS if function.__name__ == sys.argv[1])
    print(json.dumps({"kills": scenario(Path(sys.argv[2]))}))
