"""The way in: units become prepared rows, ready for the engine.

`RequestSource` owns a thread that claims units, reads their rows, renders and tokenises them, and keeps a bounded window of
them ready, in an order that serves throughput. It does not know how tokens are made; `worker.sink` owns the way out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchinfer.data.partials import Key, load_partial
from batchinfer.data.prompts import PreparedRow, PromptBuilder
from batchinfer.data.reader import UnitReader
from batchinfer.data.results import RowResult
from batchinfer.engine.ordering import order_window
from batchinfer.job.claims import ClaimBoard
from batchinfer.job.manifest import Manifest
from batchinfer.job.rundir import RunDir
from batchinfer.worker.generations import Earlier, Generations, pick_rows
from batchinfer.worker.isolation import Isolation, Trial

PREPARE_ROWS = 128  # rows rendered and tokenised in one call: enough to parallelise, little enough to start soon
FULL_INTERVAL_S = 0.005  # how often a source with enough rows looks whether they still are enough
CLAIM_INTERVAL_S = 1.0  # how often a replica with nothing to do looks for a unit that has become free


@dataclass(slots=True)
class OpenUnit:
    """A claimed unit until its commit: its rows as they were read, and a place for the samples of each row."""

    number: int
    epoch: int  # of the claim that it was read under
    keys: list[tuple[str, int]]
    inputs: pa.Table
    results: list[list[RowResult]]  # of a row that is not admitted yet: none
    remaining: int  # results still to come: one for each row that is not admitted yet, and the samples that are running
    saved: dict[Key, RowResult]  # what replicas that were stopped had of rows that are not admitted yet
    generation: int = 0
    earlier: Earlier | None = None  # what a retry begins from: only some rows are computed, and `results` of the others empty

    def samples(self, index: int, asked: int) -> Sequence[int]:
        """Those of a row that are to be computed."""
        wanted = None if self.earlier is None else self.earlier.wanted[index]
        return range(asked) if wanted is None else wanted

    def failed(self, index: int, error: RowResult) -> list[RowResult]:
        """A row that is an error: once, or where other samples of it stand already, for each that was to be computed."""
        if self.earlier is None or self.earlier.wanted[index] is None:
            return [error]
        tokens = self.earlier.prompt_tokens[index]
        return [replace(error, num_prompt_tokens=tokens, sample=sample) for sample in self.samples(index, 0)]

    def begun_rows(self, replica: str) -> Iterator[tuple[Key, RowResult]]:
        """What is there to be saved: finished samples whole, others as far as they have come. `replica`: who finished them."""
        for key, results in zip(self.keys, self.results, strict=True):
            for result in results:
                if result.token_ids and result.error is None:
                    if result.ended:
                        result.replica = result.replica or replica
                    else:
                        result.step_first = None  # the steps are to be those of who finishes it
                    yield (*key, result.sample), result
        yield from self.saved.items()


@dataclass(slots=True)
class PendingRow:
    """One prepared row on its way to the engine."""

    unit: OpenUnit
    index: int
    prepared: PreparedRow


class RequestSource:
    """Claims, reads and prepares rows in a thread of its own; `take` hands them over without ever waiting.

    Rows of a unit are gathered until there are `window` of them, or until none lies ready any more; then they are ordered for
    the prefix cache (`order_window`) and handed over, all of them before any that was gathered later. At most `window` rows
    lie ready and about as many are gathered, so host memory does not grow with the input; a further unit is claimed when no
    more than `enough` are left. An exception in the thread is raised again by `take`.
    """

    def __init__(
        self,
        run_dir: RunDir,
        manifest: Manifest,
        board: ClaimBoard,
        reader: UnitReader,
        builder: PromptBuilder,
        window: int,
        enough: int,
        generations: Generations,
        isolation: Isolation,
    ):
        self._run_dir, self._manifest, self._board, self._reader, self._builder = run_dir, manifest, board, reader, builder
        self._generations, self._isolation = generations, isolation
        self._rows: queue.Queue[PendingRow] = queue.Queue(maxsize=window)
        self._window, self._enough = window, enough
        self._stop = threading.Event()
        self._look = threading.Event()
        self._error: BaseException | None = None
        self.finished = False  # every unit of the run is committed, by whomever
        self.turns = 0  # of the thread: it goes on
        self._put_count = 0  # rows, by the thread
        self._taken = self._rested = 0  # rows, by the caller of `take`; how many they were when it had nothing left to do
        self._thread = threading.Thread(target=self._run, name="request-source", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self) -> PendingRow | None:
        """The next row, or None when none is ready."""
        if self._error is not None:
            raise self._error
        try:
            row = self._rows.get_nowait()
        except queue.Empty:
            return None
        self._taken += 1
        return row

    def rest(self) -> None:
        """Said by the caller of `take`: nothing of what it has taken is running any more, nor waits for its commit."""
        self._rested = self._taken

    def look(self) -> None:
        """A unit has been committed here: it may have been the last, so look now and not at the next interval."""
        self._look.set()

    def stop(self) -> None:
        """Claims nothing further; returns when the thread has ended. Rows not yet taken are left to the claims' release."""
        self._stop.set()
        self._look.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and not self.finished:
                self.turns += 1
                if self._rows.qsize() > self._enough:  # what waits here is work that another replica could be doing
                    self._stop.wait(FULL_INTERVAL_S)
                    continue
                number = self._board.claim()
                if number is not None:
                    self._prepare(number)
                elif self._board.finished():
                    self.finished = True
                else:
                    self._look.wait(CLAIM_INTERVAL_S)
                    self._look.clear()
        except BaseException as error:
            self._error = error

    def _open(self, number: int) -> OpenUnit:
        """Reads a unit, what replicas that were stopped had of it, and what is there of it where a retry is to replace that."""
        unit, shards, epoch = self._manifest.units[number], self._manifest.shards, self._board.epoch(number)
        table = self._reader.read(unit)
        keys = [(shards[r.shard].path, row) for r in unit for row in range(r.start, r.stop)]
        saved = load_partial(self._run_dir, number, epoch, self._manifest.fingerprint) if epoch else {}
        earlier = self._generations.earlier(number, keys, table)
        remaining = len(keys) if earlier is None else len(earlier.wanted)
        results: list[list[RowResult]] = [[] for _ in keys]
        return OpenUnit(number, epoch, keys, table, results, remaining, saved, self._generations.of(number), earlier)

    def _prepare(self, number: int) -> None:
        opened = self._open(number)
        rows = range(len(opened.keys)) if opened.earlier is None else sorted(opened.earlier.wanted)
        trial = self._isolation.trial(number, opened.generation, rows)
        if trial is None:
            self._hand_over(opened, rows)
        elif (left := self._run_apart(opened, trial, set(rows))) is not None:
            condemned = trial.condemned
            if all(self._put(PendingRow(opened, row, error)) for row, error in condemned.items()):
                self._hand_over(opened, sorted(left - condemned.keys()))

    def _run_apart(self, opened: OpenUnit, trial: Trial, rows: set[int]) -> set[int] | None:
        """Rows of a unit that killed replicas, a set at a time, with nothing else in the engine. Returns those that did not run,
        because more is known of them already; None: it was stopped."""
        while (suspects := trial.next_set()) is not None:
            if not self._wait_for_rest():
                return None
            trial.begin(suspects)
            if not self._hand_over(opened, suspects) or not self._wait_for_rest():
                return None
            trial.passed(suspects, opened.epoch, dict(opened.begun_rows(self._isolation.replica)) if opened.remaining else {})
            rows = rows - set(suspects)
        return rows

    def _wait_for_rest(self) -> bool:
        """Until whatever was handed over is done with. False: it was stopped before."""
        while not self._stop.is_set():
            if self._rested == self._put_count:
                return True
            self.turns += 1
            self._stop.wait(FULL_INTERVAL_S)
        return False

    def _hand_over(self, opened: OpenUnit, rows: Sequence[int]) -> bool:
        """False: it was stopped before all rows were handed over."""
        table, keys = opened.inputs, opened.keys
        gathered: list[PendingRow] = []
        step = min(PREPARE_ROWS, self._window)
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            self.turns += 1
            prepared = self._builder.prepare(pick_rows(table, chunk), [keys[index] for index in chunk])
            gathered += [PendingRow(opened, index, row) for index, row in zip(chunk, prepared, strict=True)]
            if start + step >= len(rows) or len(gathered) >= self._window or self._rows.empty():
                order = order_window([row.prepared.token_ids or [] for row in gathered])
                if not all(self._put(gathered[i]) for i in order):
                    return False
                gathered = []
        return True

    def _put(self, row: PendingRow) -> bool:
        while not self._stop.is_set():
            try:
                self._rows.put(row, timeout=0.1)
                self._put_count += 1
                return True
            except queue.Full:
                continue
        return False
