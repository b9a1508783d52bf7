"""The way out: tokens become results, results become committed units.

`CompletionSink` makes a request of every sample of a row, gathers results by unit and commits every finished unit in the
background. A batch never drains at the border of a unit.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa

from batchinfer.config import Config
from batchinfer.data.grammar import reason
from batchinfer.data.partials import prompt_hash, save_partial
from batchinfer.data.prompts import PreparedRow
from batchinfer.data.results import Logprobs, RowResult
from batchinfer.data.tokenizer import IncrementalDecoder, StopChecker, Tokenizer
from batchinfer.data.writer import commit_unit, output_schema, unit_footer, unit_table
from batchinfer.engine.sequence import Request, TokenOutput
from batchinfer.job.manifest import Manifest, versions
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published
from batchinfer.worker.source import OpenUnit, PendingRow

log = logging.getLogger(__name__)

DECODE_ROWS = 256  # rows decoded in one call
LATEST_SHARE = 1 / 64  # weight of a sample in the mean time that samples take
MAX_PENDING_COMMITS = 4  # finished units that may wait for a slow file system before the engine does


@dataclass(slots=True)
class RunningRow:
    """A row of which samples are inside the engine."""

    unit: OpenUnit
    remaining: int  # samples


@dataclass(slots=True)
class RunningSample:
    """One sample of a row inside the engine."""

    row: RunningRow
    result: RowResult
    admitted_s: float
    checker: StopChecker | None


@dataclass
class Totals:
    """What this replica has done so far, for its progress file. Rows are input rows; errors count output rows."""

    rows_done: int = 0
    rows_committed: int = 0
    units_committed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    row_s: float = 0.0  # how long a sample takes from its admission on: the mean of many, the latest counting most

    def took(self, seconds: float) -> None:
        self.row_s += (seconds - self.row_s) * (LATEST_SHARE if self.row_s else 1.0)


class CompletionSink:
    """Gathers the results of rows and commits every unit whose rows are all there.

    Decoding, building the table and the commit itself run in one background thread; `before_commit` is called there first
    (statistics are flushed, the weights' hash is awaited), so that a committed row never points at something lost, and
    `after_commit` when the unit is there. `before_wait` is called where the engine has to wait for a commit.
    """

    def __init__(
        self,
        run_dir: RunDir,
        manifest: Manifest,
        config: Config,
        replica: str,
        tokenizer: Tokenizer | None,
        input_schema: pa.Schema,
        before_commit: Callable[[], None],
        after_commit: Callable[[], None] = lambda: None,
        before_wait: Callable[[], None] = lambda: None,
    ):
        self._run_dir, self._manifest, self._config, self._replica = run_dir, manifest, config, replica
        self._tokenizer, self._before_commit, self._after_commit = tokenizer, before_commit, after_commit
        self._before_wait = before_wait
        self._schema = output_schema(input_schema, manifest.columns, config)
        self._versions, self._fingerprint = versions(), manifest.fingerprint
        self._running: dict[int, RunningSample] = {}
        self._open: dict[int, OpenUnit] = {}
        self._next_id = 0
        self._commits: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self.totals = Totals()

    def admit(self, row: PendingRow) -> list[Request]:
        """Registers a row. Returns what the engine is to do: a request for each sample, none when the row is an error already."""
        unit, prepared = row.unit, row.prepared
        self._open.setdefault(unit.number, unit)
        samples = unit.samples(row.index, len(prepared.seeds))
        if prepared.error is not None:
            error = RowResult(error=prepared.error, error_message=prepared.error_message)
            results = unit.failed(row.index, error)
        else:
            results = _begun(row, samples)
        unit.results[row.index] = results
        unit.remaining += len(results) - 1
        running = RunningRow(unit, len(results))
        for result in results:
            if result.ended:
                self._finish(running, result)
        going = [result for result in results if not result.ended]
        return [self._start(running, result, prepared, is_first=result is results[0]) for result in going]

    def _start(self, row: RunningRow, result: RowResult, prepared: PreparedRow, is_first: bool) -> Request:
        sampling = prepared.sampling
        assert prepared.token_ids is not None and sampling is not None, "it is no error"
        if not is_first and sampling.prompt_logprobs is not None:  # it is the first one's prompt
            sampling = replace(sampling, prompt_logprobs=None)
        checker = None
        if sampling.stop and self._tokenizer is not None:
            checker = StopChecker(sampling.stop, IncrementalDecoder(self._tokenizer), sampling.min_tokens)
            checker.push(result.token_ids)  # without a match, or it would have ended
        self._next_id += 1
        self._running[self._next_id] = RunningSample(row, result, time.monotonic() - (result.latency_s or 0.0), checker)
        seed = prepared.seeds[result.sample]
        return Request(self._next_id, prepared.token_ids, sampling, seed, prepared.grammar, list(result.token_ids))

    def accept(self, outputs: list[TokenOutput], step: int) -> list[int]:
        """Takes a step's tokens. Returns the requests to abort: those that a stop string has ended."""
        stopped = []
        for output in outputs:
            running = self._running[output.request_id]
            result = running.result
            if result.step_first is None:
                result.step_first = step
            if output.ttft_s is not None:
                result.ttft_s = output.ttft_s
            _append(result, output)
            text = running.checker.push(output.token_ids) if running.checker else None
            if text is None and output.finish_reason is None:
                continue
            if text is not None and output.finish_reason is None:
                stopped.append(output.request_id)
            result.step_last, result.completion = step, text
            result.finish_reason = "stop" if text is not None else str(output.finish_reason)
            if output.error is not None:
                result.completion, result.finish_reason = None, "error"
                result.error, message = output.error
                follows = result.error == "bad_grammar"
                result.error_message = f"the grammar cannot be followed: {reason(message)}" if follows else message
            result.latency_s = time.monotonic() - running.admitted_s
            self.totals.took(result.latency_s)
            del self._running[output.request_id]
            self._finish(running.row, result)
        return stopped

    @property
    def idle(self) -> bool:
        """No row is running and no unit is open or waits for its commit."""
        self._reap(wait=False)
        return not self._running and not self._open and not self._commits

    @property
    def num_pending(self) -> int:
        """Units that wait for their commit, or for `idle` to notice that it has ended."""
        return len(self._commits)

    @property
    def open_units(self) -> list[int]:
        return sorted(self._open)

    def save(self, held: Mapping[int, int]) -> None:
        """Leaves what there is of those open units that are held (unit -> epoch) to whoever takes them next. Raises OSError."""
        now = time.monotonic()
        for running in self._running.values():
            running.result.latency_s = now - running.admitted_s
        for unit in self._open.values():
            if unit.number in held and (found := dict(unit.begun_rows(self._replica))):
                save_partial(self._run_dir, unit.number, held[unit.number], self._manifest.fingerprint, found)
                log.info("unit %d is given back with what there is of %s samples", unit.number, f"{len(found):,}")

    def close(self) -> list[int]:
        """Ends the pending commits. Returns the numbers of the units that stay unfinished."""
        self._reap(wait=True)
        self._thread.shutdown()
        return self.open_units

    def _finish(self, row: RunningRow, result: RowResult) -> None:
        unit = row.unit
        row.remaining -= 1
        unit.remaining -= 1
        self.totals.rows_done += row.remaining == 0
        if result.error:
            self.totals.errors[result.error] += 1
        if unit.remaining == 0:
            del self._open[unit.number]
            self._reap(wait=len(self._commits) >= MAX_PENDING_COMMITS)
            self._commits.append(self._thread.submit(self._commit, unit))

    def _reap(self, wait: bool) -> None:
        """Raises what a commit raised; forgets the commits that have ended."""
        pending = []
        for commit in self._commits:
            if wait and not commit.done():
                self._before_wait()
            if wait or commit.done():
                commit.result()
            else:
                pending.append(commit)
        self._commits = pending

    def _commit(self, unit: OpenUnit) -> None:
        samples = (result for row in unit.results for result in row)
        self._decode([result for result in samples if result.error is None and result.completion is None])
        table = unit_table(unit.inputs, unit.keys, unit.results, self._config, self._replica, self._schema)
        if unit.earlier is not None:
            table = unit.earlier.merged(table, unit.keys)
        origin = (self._replica, self._versions, self._fingerprint)
        footer = unit_footer(unit.number, unit.generation, unit.inputs, table, self._config.output.prefix, *origin)
        self._before_commit()
        outcome = commit_unit(self._run_dir, unit.number, unit.generation, table, footer, self._config.output.compression)
        if unit.epoch:
            self._run_dir.remove_partials(unit.number)
        self._run_dir.supersede_unit(unit.number, unit.generation)
        self._after_commit()
        if outcome is Published.LOST:
            log.info("unit %d was committed by another replica first; this replica's copy of it is dropped", unit.number)
            return
        self.totals.rows_committed += sum(map(bool, unit.results))
        self.totals.units_committed += 1

    def _decode(self, results: list[RowResult]) -> None:
        if self._tokenizer is None:
            return
        for start in range(0, len(results), DECODE_ROWS):
            batch = results[start : start + DECODE_ROWS]
            for result, text in zip(batch, self._tokenizer.decode_batch([r.token_ids for r in batch]), strict=True):
                result.completion = text


def _begun(row: PendingRow, samples: Sequence[int]) -> list[RowResult]:
    """A result for each of these samples of a row, as far as stopped replicas had come with it."""
    unit, prepared = row.unit, row.prepared
    assert prepared.token_ids is not None, "it is no error"
    asked = prompt_hash(prepared.token_ids)
    results = []
    for sample in samples:
        result = unit.saved.pop((*unit.keys[row.index], sample), None)
        if result is None or result.prompt_hash != asked:
            result = RowResult(prepared.num_prompt_tokens, sample=sample, prompt_hash=asked)
        results.append(result)
    return results


def _append(result: RowResult, output: TokenOutput) -> None:
    result.token_ids.extend(output.token_ids)
    if output.logprobs is not None:
        result.logprobs = result.logprobs or Logprobs()
        result.logprobs.extend(output.logprobs)
    if output.prompt_logprobs is not None:
        result.prompt_logprobs = Logprobs()
        result.prompt_logprobs.extend(output.prompt_logprobs)
