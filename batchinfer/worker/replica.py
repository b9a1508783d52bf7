"""One replica at work: the loop that joins the source of rows, the engine and the sink, on rank 0.

Phases, as `progress.json` names them: starting, loading, running, waiting (others hold the units that are left), and at the
end done, stopped (by a signal, `cancel`, or because its job's time runs out) or failed. A row that is begun too late to be
finished before the job ends is not begun: then the replica gives back what it has not begun, and only finishes. However it
ends, what there is of the rows in work is saved (`data.partials`) before their units are given back.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchinfer.config import Config
from batchinfer.data.chat import ChatTemplate
from batchinfer.data.columns import columns_to_read
from batchinfer.data.prompts import PromptBuilder, load_tokenizer
from batchinfer.data.reader import UnitReader, read_schema, scan_shards
from batchinfer.engine.engine import Engine
from batchinfer.job.attempts import doubtful_units
from batchinfer.job.claims import ClaimBoard, Identity
from batchinfer.job.manifest import NOT_NULL, Manifest, check_weights, hash_weights
from batchinfer.job.process import start_time
from batchinfer.job.retry import goals
from batchinfer.job.rundir import RunDir
from batchinfer.job.vitals import Phase, Pulse
from batchinfer.model.config import ModelShape
from batchinfer.stats import GpuSampler, StepRecorder
from batchinfer.worker.environment import write_environment
from batchinfer.worker.generations import Generations
from batchinfer.worker.isolation import Isolation
from batchinfer.worker.progress import Progress
from batchinfer.worker.sink import CompletionSink
from batchinfer.worker.source import RequestSource

log = logging.getLogger(__name__)

ORDERED_ROWS = 1024  # a window to order: larger ones find more in the prefix cache (docs/performance.md)
IDLE_S = 0.02  # pause of the loop when neither a row nor a token is there
CANCEL_INTERVAL_S = 2.0
HASH_WAIT_S = 5.0  # what a stopped replica waits for the weights' hash, without which it saves nothing


class Background:
    """A function in a thread, whose exception is raised where its end is awaited."""

    def __init__(self, work: Callable[[], None], name: str):
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def ends_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class Assignment:
    """What a replica is told: the run, its own name in it, and the settings of the submission that started it."""

    run_dir: RunDir
    manifest: Manifest
    config: Config
    name: str
    submission: int | None  # None: started by hand
    work_until: float = math.inf  # seconds since the Unix epoch, on this host's clock


class Replica:
    """Runs units of one run through one engine until none is left, or until it is told to stop."""

    def __init__(self, assignment: Assignment, shape: ModelShape, engine: Engine, progress: Progress, pulse: Pulse) -> None:
        run_dir, manifest, config = assignment.run_dir, assignment.manifest, assignment.config
        self._assignment, self._engine, self._progress, self._pulse = assignment, engine, progress, pulse
        self._background_turns: object = None  # as far as the threads beside the loop had come when it last beat idly
        self._origins = Background(self._record_origins, "origins")
        self._recorder = StepRecorder(run_dir, assignment.name, config.stats_every, GpuSampler.start() if config.hw.gpu else None)
        identity = Identity.here(assignment.name)
        retried = goals(run_dir)
        generations = Generations(run_dir, retried, config.output.prefix)
        self._board = ClaimBoard(
            run_dir,
            len(manifest.units),
            identity,
            config.engine.stall_timeout_s,
            goals={unit: goal.generation for unit, goal in retried.items()},
            doubtful=doubtful_units(run_dir),
        )
        isolation = Isolation(run_dir, manifest, assignment.name, self._may_save)
        root = input_root(manifest, config)
        schema = input_schema(manifest, root)
        reader = UnitReader(root, manifest.shards, columns_to_read(config.input, schema, manifest.columns))
        tokenizer = load_tokenizer(config)
        template = ChatTemplate.load(config.model.path, config.model.chat_template)
        length, vocab_size = engine.max_model_len, shape.vocab_size
        builder = PromptBuilder(config, tokenizer, template, length, vocab_size, shape.eos_token_ids)
        rows = max(1, config.engine.max_num_seqs // config.sampling.n)  # that run at once
        window, enough = max(2 * rows, ORDERED_ROWS), -(-rows // 2)
        self._source = RequestSource(run_dir, manifest, self._board, reader, builder, window, enough, generations, isolation)
        self._sink = CompletionSink(
            run_dir,
            manifest,
            config,
            assignment.name,
            tokenizer,
            schema,
            self._before_commit,
            self._after_commit,
            lambda: pulse.beat(Phase.COMMITTING),
        )
        self._prompt_tokens = self._completion_tokens = 0  # computed so far, of finished rows and others
        self._stopping = threading.Event()
        self._finishing = False  # nothing further is begun: there is no time for it
        self._looked_for_cancel = time.monotonic()

    def stop(self) -> None:
        """Asks the loop to end after the step in hand. Safe in a signal handler."""
        self._stopping.set()

    def run(self) -> bool:
        """True when every unit of the run is committed, False when stopped before."""
        self._progress.watch(self._gauges)
        self._progress.enter("running")
        self._source.start()
        try:
            while not self._stopping.is_set() and not self._finished():
                self._turn()
            if self._engine.in_flight is not None:
                self._step(last=True)
            return self._source.finished and self._sink.idle
        except BaseException:
            self._progress.held = self._board.held()  # while they are
            raise
        finally:
            self._wind_up()

    def _turn(self) -> None:
        """One pass: admit what is ready, do one step, hand on what came out of it."""
        self._progress.tick()
        self._look_for_cancel()
        self._look_at_the_time()
        self._admit()
        if not self._engine.has_work():
            self._rest()
            return
        self._progress.enter("running")
        self._pulse.beat(Phase.STEPPING, self._engine.num_steps)
        self._step()

    def _rest(self) -> None:
        """A pass without work. It shows life only when what it waits for does: the last commit, else the next row."""
        idle, turns = self._sink.idle, (self._sink.num_pending, self._sink.num_pending or self._source.turns)
        if turns != self._background_turns:
            self._background_turns = turns
            self._pulse.beat(Phase.COMMITTING if self._sink.num_pending else Phase.IDLE)
        if not self._sink.num_pending:
            self._source.rest()
        self._progress.enter("running" if not idle else "waiting")
        time.sleep(IDLE_S)

    def _step(self, last: bool = False) -> None:
        outputs, stats = self._engine.step(last)
        self._recorder.record(stats)
        self._prompt_tokens += stats.prefill_tokens
        self._completion_tokens += stats.decode_tokens
        for request_id in self._sink.accept(outputs, stats.step):
            self._engine.abort(request_id)
        if "first_token" not in self._progress.phases and outputs:
            self._progress.phases["first_token"] = process_age()

    def _admit(self) -> None:
        """Keeps the engine full and a few sequences waiting, so that its scheduler can fill every step."""
        limit = self._assignment.config.engine.max_num_seqs
        ahead = max(8, limit // 4, limit - self._engine.num_running)
        while not self._finishing and self._engine.num_waiting < ahead and (row := self._source.take()) is not None:
            for request in self._sink.admit(row):
                self._engine.add(request)

    def _finished(self) -> bool:
        if self._engine.has_work():
            return False
        return self._finishing or (self._source.finished and self._sink.idle)

    def _look_at_the_time(self) -> None:
        """Nothing is begun that would not be finished, but for that no more than the warning time is spent.

        To interrupt a row costs a prefill, to begin none leaves the device ever less to do.
        """
        left, row_s = self._assignment.work_until - time.time(), self._sink.totals.row_s
        if left <= 0:
            log.info("the time of the job is up")
            self.stop()
        elif not self._finishing and left < min(row_s, self._assignment.config.launcher.signal_delay_s):
            log.info("%.0f s are left, and a row takes %.0f s: no further row is begun", left, row_s)
            self._finishing = True
            self._source.stop()
            self._release(set(self._board.held()) - set(self._sink.open_units))

    def _look_for_cancel(self) -> None:
        now, submission = time.monotonic(), self._assignment.submission
        if submission is not None and now - self._looked_for_cancel > CANCEL_INTERVAL_S:
            self._looked_for_cancel = now
            if self._assignment.run_dir.is_cancelled(submission):
                log.info("the run was cancelled")
                self.stop()

    def _wind_up(self) -> None:
        """Leaves nothing behind that another replica would have to wait for: commits end, open claims are given back."""
        self._source.stop()
        if self._sink.open_units:
            self._save()
        self._sink.close()
        self._recorder.flush()
        self._release(self._board.held())

    def _save(self) -> None:
        """Whatever keeps it from being saved, the rows are only made again."""
        if not self._origins.ends_within(HASH_WAIT_S):
            log.warning("what there is of rows in work is not saved: it is not known yet whether the weights are the run's")
            return
        try:
            self._before_commit()
            self._sink.save({unit: self._board.epoch(unit) for unit in self._board.held()})
        except (OSError, pa.ArrowException) as error:
            log.warning("what there is of rows in work is lost: %s", error)

    def _may_save(self) -> bool:
        """Not as long as nobody knows whether the weights are the run's. Raises what a commit would."""
        if not self._origins.ends_within(0):
            return False
        self._before_commit()
        return True

    def _release(self, units: Iterable[int]) -> None:
        for unit in units:
            self._board.release(unit)

    def _before_commit(self) -> None:
        self._origins.join()
        self._recorder.flush()
        self._progress.tick()

    def _after_commit(self) -> None:
        self._progress.committed()
        self._source.look()

    def _record_origins(self) -> None:
        """What committed rows come from: it is there before them."""
        assignment, model = self._assignment, self._assignment.config.model
        write_environment(assignment.run_dir, assignment.name, assignment.config)
        if model.load_format == "safetensors" and model.path:
            check_weights(assignment.run_dir, hash_weights(model.path))

    def _gauges(self) -> dict[str, Any]:
        totals, engine = self._sink.totals, self._engine
        blocks = engine.scheduler.blocks
        return {
            "rows_done": totals.rows_done,
            "rows_committed": totals.rows_committed,
            "units_committed": totals.units_committed,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "errors": dict(totals.errors),
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "kv_used": blocks.num_used_blocks,
            "kv_total": blocks.num_blocks,
        }


def input_root(manifest: Manifest, config: Config) -> Path:
    """Where the shards lie now: a submission may name another place for the same files."""
    if config.input.paths == manifest.config.input.paths:
        return Path(manifest.input_root)
    return scan_shards(config.input.paths).root


def input_schema(manifest: Manifest, root: Path) -> pa.Schema:
    """The input's columns as the first shard has them, nullable where they are so in any shard. Raises InputChanged."""
    schema = read_schema(root, manifest.shards[0])
    required = {line.removesuffix(NOT_NULL) for line in manifest.request["input.schema"] if line.endswith(NOT_NULL)}
    return pa.schema([field.with_nullable(f"{field.name}: {field.type}" not in required) for field in schema], schema.metadata)


def process_age() -> float:
    """Seconds since this process was started, imports included."""
    started = start_time(os.getpid())
    assert started is not None, "this process is alive"
    with open("/proc/uptime") as uptime:
        return round(float(uptime.read().split()[0]) - started / os.sysconf("SC_CLK_TCK"), 3)
