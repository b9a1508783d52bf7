"""What a replica says of itself while it works: `replicas/<name>/progress.json`, rewritten every second.

The `beat` in it counts passes of the replica's main loop and finished commits, not seconds: a replica that hangs stands
still there even while its process lives, and others may then take over its claims.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from batchinfer.job.claims import Identity
from batchinfer.job.rundir import RunDir
from batchinfer.publish import replace_bytes

INTERVAL_S = 1.0


class Progress:
    """Writes the progress file in the background. `gauges` is asked for the live figures at every writing."""

    def __init__(self, run_dir: RunDir, replica: str):
        self._path = run_dir.progress(replica)
        self._process = dataclasses.asdict(Identity.here(replica))  # so that watchers of this host see its end at once
        self._beat = 0
        self._phase = "starting"
        self._error: str | None = None
        self._idle_since: float | None = None  # nothing is running, and nothing was found to claim; seconds since the Unix epoch
        self._last_commit: float | None = None
        self._gauges: Callable[[], dict[str, Any]] = dict
        self._rates = Rates()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self.phases: dict[str, float] = {}
        self.held: list[int] = []  # units, when an error came: they are given back before the end
        self.is_outside = False  # the error has nothing to do with the rows at work

    def start(self) -> None:
        self._write()
        self._thread.start()

    def tick(self) -> None:
        """The main loop went round, or a commit ended."""
        self._beat += 1

    def committed(self) -> None:
        """A unit has just been committed."""
        self._last_commit = time.time()

    def watch(self, gauges: Callable[[], dict[str, Any]]) -> None:
        self._gauges = gauges

    def enter(self, phase: str, error: str | None = None) -> None:
        """A new phase (see `Replica`), on disk at once."""
        if (phase, error) != (self._phase, self._error):
            self._phase, self._error = phase, error
            self._idle_since = (self._idle_since or time.time()) if phase in ("waiting", "done") else None
            self.tick()
            self._write()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._write()

    def _write(self) -> None:
        with self._lock:
            gauges = self._gauges()
            record = {
                "beat": self._beat,
                "phase": self._phase,
                "error": self._error,
                "is_outside": self.is_outside,
                "held": self.held,
                "phases": self.phases,
                "idle_since": self._idle_since,
                "last_commit": self._last_commit,
                "process": self._process,
                **gauges,
                **self._rates.update(gauges),
                "updated": time.time(),
            }
            replace_bytes(self._path, json.dumps(record).encode())


class Rates:
    """Tokens a second over the last `WINDOW_S` seconds, from the totals of successive writings."""

    WINDOW_S = 15.0

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int]] = []

    def update(self, gauges: dict[str, Any]) -> dict[str, float]:
        now = time.monotonic()
        self._samples.append((now, gauges.get("prompt_tokens", 0), gauges.get("completion_tokens", 0)))
        while len(self._samples) > 2 and now - self._samples[0][0] > self.WINDOW_S:
            self._samples.pop(0)
        then, prompt, completion = self._samples[0]
        seconds = max(now - then, 1e-9)
        _, last_prompt, last_completion = self._samples[-1]
        return {"prompt_tok_s": (last_prompt - prompt) / seconds, "completion_tok_s": (last_completion - completion) / seconds}
