"""How far a run is, for people: `status`, and what the launching terminal shows while it waits.

Everything is read from the run directory, so any host may watch. Committed rows are what counts; rows that a replica has
finished but not yet committed are shown apart. On a terminal the picture is redrawn; elsewhere one plain line is printed
at the start, every ten seconds if something changed, and at the end.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from batchinfer.data.schema import UnitFooter, num_rows
from batchinfer.data.writer import read_footer
from batchinfer.job.claims import Identity
from batchinfer.job.failure import newest_failure
from batchinfer.job.logs import LogFollower
from batchinfer.job.manifest import Manifest
from batchinfer.job.replica import Death, read_death, read_progress
from batchinfer.job.retry import unfinished
from batchinfer.job.rundir import RunDir

POLL_S = 0.5
LINE_EVERY_S = 10.0
SILENT_AFTER_S = 60.0  # a replica whose heartbeat stands still for so long is left out of the rates
ENDED = ("done", "failed", "stopped", "killed")


@dataclass
class ReplicaView:
    """What a replica said last, and for how long its heartbeat has stood still on this observer's clock."""

    name: str
    progress: dict[str, Any]
    age_s: float
    death: Death | None
    is_gone: bool = False  # its process is, as far as this host can see

    @property
    def is_working(self) -> bool:
        return self.death is None and self.phase not in ENDED and self.age_s < SILENT_AFTER_S

    @property
    def phase(self) -> str:
        if self.death:
            return "died"
        phase = str(self.progress.get("phase", "starting"))
        return "killed" if self.is_gone and phase not in ENDED else phase

    def number(self, key: str) -> float:
        return float(self.progress.get(key) or 0)


@dataclass
class Snapshot:
    """One look at a run."""

    rows_total: int
    units_total: int
    rows: int = 0
    samples: int = 0  # output rows, of the rows that are committed
    units: int = 0
    rows_in_progress: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    replicas: list[ReplicaView] = field(default_factory=list)
    is_retry: bool = False  # then rows and units are those of the retry

    @property
    def is_complete(self) -> bool:
        return self.units >= self.units_total

    @property
    def working(self) -> list[ReplicaView]:
        return [replica for replica in self.replicas if replica.is_working]

    def total(self, key: str) -> float:
        """Sum of a progress value over the replicas at work."""
        return sum(replica.number(key) for replica in self.working)

    @property
    def kv_share(self) -> float | None:
        total = self.total("kv_total")
        return self.total("kv_used") / total if total else None

    @property
    def eta_s(self) -> float | None:
        """Rows left, at the mean length of the completions so far and the present rate."""
        rate = self.total("completion_tok_s")
        if not rate or not self.rows or self.is_retry:
            return None
        left = max(0, self.rows_total - self.rows - self.rows_in_progress)
        return left * (self.completion_tokens / self.rows) / rate


class RunView:
    """Reads a run again and again; a completions footer is read once."""

    def __init__(self, run_dir: RunDir, clock: Callable[[], float] = time.monotonic) -> None:
        manifest = Manifest.load(run_dir)
        self._run_dir, self._clock = run_dir, clock
        self._rows_total, self._units_total = sum(map(num_rows, manifest.units)), len(manifest.units)
        self._footers: dict[int, UnitFooter] = {}
        self._retry = unfinished(run_dir)
        self._here = Identity.here("observer")
        self._beats: dict[str, tuple[Any, float]] = {}  # replica -> heartbeat, and our clock when it was first seen

    def look(self) -> Snapshot:
        self._read_new_footers()
        footers = list(self._footers.values())
        snapshot = Snapshot(
            self._rows_total,
            self._units_total,
            rows=sum(footer.rows for footer in footers),
            samples=sum(footer.samples for footer in footers),
            units=len(footers),
            prompt_tokens=sum(footer.prompt_tokens for footer in footers),
            completion_tokens=sum(footer.completion_tokens for footer in footers),
            replicas=[self._replica(name) for name in sorted(os.listdir(self._run_dir.replicas))],
        )
        committed: Counter[str] = Counter()
        for footer in footers:
            committed[footer.replica] += footer.rows
            snapshot.errors.update(footer.errors)
        ahead = (int(replica.number("rows_done")) - committed[replica.name] for replica in snapshot.working)
        snapshot.rows_in_progress = 0 if snapshot.is_complete else sum(max(0, rows) for rows in ahead)
        return self._of_retry(snapshot) if self._retry else snapshot

    def _of_retry(self, snapshot: Snapshot) -> Snapshot:
        """The whole run is there already: what counts is how much of it has been made anew."""
        there = {unit: footer.generation for unit, footer in self._footers.items()}
        reached = [goal for unit, goal in self._retry.items() if there.get(unit, -1) >= goal.generation]
        rows = sum(goal.rows for goal in reached)
        total = sum(goal.rows for goal in self._retry.values())
        return replace(
            snapshot,
            rows_total=total,
            units_total=len(self._retry),
            rows=rows,
            samples=rows,
            units=len(reached),
            is_retry=True,
        )

    def _read_new_footers(self) -> None:
        for unit, generation in self._run_dir.done_units().items():
            known = self._footers.get(unit)
            if known is None or known.generation < generation:
                self._footers[unit] = self._run_dir.read_committed(unit, generation, read_footer)

    def _replica(self, name: str) -> ReplicaView:
        progress = read_progress(self._run_dir, name)
        beat, now = progress.get("beat"), self._clock()
        if name not in self._beats:  # all that is known of the time before is the file's own date
            self._beats[name] = (beat, now - self._age_of_file(name))
        elif self._beats[name][0] != beat:
            self._beats[name] = (beat, now)
        process = progress.get("process")
        is_gone = process is not None and Identity(**process).is_dead_beside(self._here)
        return ReplicaView(name, progress, now - self._beats[name][1], read_death(self._run_dir, name), is_gone)

    def _age_of_file(self, name: str) -> float:
        progress = self._run_dir.progress(name)
        path = progress if progress.exists() else self._run_dir.replica(name)
        return max(0.0, time.time() - path.stat().st_mtime)


def status(run_dir: RunDir, keep_watching: bool = False) -> int:
    """Print how far the run is, once or until it is complete or its last submission has failed. Returns 0 whenever the run can
    be read, complete or not: how far a run is, is the answer and not a failure."""
    if keep_watching:
        snapshot = watch(run_dir, lambda: newest_failure(run_dir) is None)
    else:
        snapshot = RunView(run_dir).look()
        print(line(snapshot))
        for replica in snapshot.replicas:
            print("  " + replica_line(replica))
    if not snapshot.is_complete and (failure := newest_failure(run_dir)):
        print(f"failed: {failure.sentence(run_dir)}")
    return 0


def watch(
    run_dir: RunDir,
    jobs_alive: Callable[[], bool],
    on_event: Callable[[str], None] | None = None,
    logs: LogFollower | None = None,
) -> Snapshot:
    """Show the run until every unit is done or no job is alive; returns the last look.

    `on_event` gets one sentence for each replica that dies meanwhile, with its reason and log; default: print it at once.
    The lines of `logs` are printed as they come.
    """
    view = RunView(run_dir)
    screen: _Lines | _Live = _Live() if sys.stdout.isatty() else _Lines()
    tell = on_event or screen.tell
    snapshot = view.look()
    known = {replica.name for replica in snapshot.replicas if replica.death}  # of earlier submissions
    with screen:
        screen.show(snapshot)
        while True:
            alive = jobs_alive()  # asked first, so that the last look comes after the end
            snapshot = view.look()
            for text in logs.lines() if logs else ():
                screen.log(text)
            for replica in snapshot.replicas:
                if replica.death and not replica.death.undecided and replica.name not in known:
                    known.add(replica.name)
                    tell(replica.death.sentence())
            if snapshot.is_complete or not alive:
                screen.finish(snapshot)
                return snapshot
            screen.show(snapshot)
            time.sleep(POLL_S)


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self) -> None:
        self._last, self._printed_at = "", float("-inf")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, snapshot: Snapshot) -> None:
        text = line(snapshot)
        if text != self._last and time.monotonic() - self._printed_at >= LINE_EVERY_S:
            self._print(text)

    def finish(self, snapshot: Snapshot) -> None:
        if line(snapshot) != self._last:
            self._print(line(snapshot))

    def tell(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    def log(self, text: str) -> None:
        print(text, flush=True)

    def _print(self, text: str) -> None:
        print(text, flush=True)
        self._last, self._printed_at = text, time.monotonic()


class _Live:
    """A picture that is redrawn, for a terminal."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(refresh_per_second=4)

    def __enter__(self) -> _Live:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def show(self, snapshot: Snapshot) -> None:
        self._live.update(_picture(snapshot))

    finish = show

    def tell(self, sentence: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(sentence, style="red"), soft_wrap=True)

    def log(self, text: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(text, style="dim"), soft_wrap=True)


def _picture(snapshot: Snapshot) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table("replica", "phase", "rows", "in tok/s", "out tok/s", "running", "waiting", "KV", "heartbeat")
    for replica in snapshot.replicas:
        if replica.is_working or replica.death:
            table.add_row(*_cells(replica))
    return Group(Text(line(snapshot)), ProgressBar(total=max(1, snapshot.rows_total), completed=snapshot.rows), table)


def line(snapshot: Snapshot) -> str:
    """The run in one line."""
    percent = 100 * snapshot.rows / snapshot.rows_total if snapshot.rows_total else 100.0
    units = f"{snapshot.units:,}/{snapshot.units_total:,} units"
    what = "retry: " if snapshot.is_retry else ""
    parts = [f"{what}{snapshot.rows:,}/{snapshot.rows_total:,} rows ({percent:.0f}%), {units}"]
    if snapshot.samples != snapshot.rows:
        parts.append(f"{snapshot.samples:,} samples")
    if snapshot.rows_in_progress:
        parts.append(f"{snapshot.rows_in_progress:,} rows not yet committed")
    if snapshot.working and not snapshot.is_complete:
        parts += _load(snapshot)
    if snapshot.errors:
        by_code = ", ".join(f"{code} {count:,}" for code, count in sorted(snapshot.errors.items()))
        parts.append(f"{snapshot.errors.total():,} error rows ({by_code})")
    if snapshot.is_complete:
        parts.append("complete")
    elif snapshot.eta_s is not None:
        parts.append(f"about {duration(snapshot.eta_s)} left")
    return "; ".join(parts)


def _load(snapshot: Snapshot) -> list[str]:
    count = len(snapshot.working)
    phases = Counter(replica.phase for replica in snapshot.working)
    total = snapshot.total
    by_phase = ", ".join(f"{n:,} {phase}" for phase, n in sorted(phases.items()))
    parts = [f"{count:,} replica{'s' if count > 1 else ''} ({by_phase})"]
    if "running" in phases:
        parts.append(f"in {total('prompt_tok_s'):,.0f} tok/s, out {total('completion_tok_s'):,.0f} tok/s")
        parts.append(f"running {total('running'):,.0f}, waiting {total('waiting'):,.0f}")
    if snapshot.kv_share is not None:
        parts.append(f"KV {snapshot.kv_share:.0%}")
    return parts


def replica_line(replica: ReplicaView) -> str:
    """One replica in one line."""
    if replica.death:
        return replica.death.sentence()
    if replica.phase in ENDED:
        return f"{replica.name}: {replica.phase}, {int(replica.number('rows_done')):,} rows"
    _, phase, rows, tok_in, tok_out, running, waiting, kv, age = _cells(replica)
    load = f"in {tok_in} tok/s, out {tok_out} tok/s, running {running}, waiting {waiting}, KV {kv}"
    return f"{replica.name}: {phase}, {rows} rows, {load}, heartbeat {age} ago"


def _cells(replica: ReplicaView) -> list[str]:
    keys = ("rows_done", "prompt_tok_s", "completion_tok_s", "running", "waiting")
    total = replica.number("kv_total")
    kv = f"{replica.number('kv_used') / total:.0%}" if total else "-"
    return [replica.name, replica.phase, *(f"{replica.number(key):,.0f}" for key in keys), kv, duration(replica.age_s)]


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"
