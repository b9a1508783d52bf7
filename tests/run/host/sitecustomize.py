"""The host that a run finds, first on its PYTHONPATH: slow steps, a clock that goes wrong, a slow file system.

SLOWED_BY names a file that holds the seconds by which each step takes longer, while it is there: so something can happen in
the middle of a run, however fast the machine is. CLOCK_IS_OFF_BY gives seconds, and FILES_TAKE the seconds by which each call
takes longer that a file server would answer.
"""

import contextlib
import os
import sys
import time
from pathlib import Path


def slow_down(calls, seconds):
    def slowed(call):
        def slow(*args, **kwargs):
            time.sleep(seconds)
            return call(*args, **kwargs)

        return slow

    for name in calls:
        setattr(os, name, slowed(getattr(os, name)))


def shift_the_clock(seconds):
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def slow_steps(by):
    from batchinfer.worker.replica import Replica

    step = Replica._step

    def slowed(self, last=False):
        step(self, last)
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(by.read_text()))

    Replica._step = slowed


if "CLOCK_IS_OFF_BY" in os.environ:
    shift_the_clock(float(os.environ["CLOCK_IS_OFF_BY"]))
if sys.orig_argv[1:4] == ["-u", "-m", "batchinfer.worker"]:
    if "FILES_TAKE" in os.environ:
        calls = ("open", "close", "write", "fsync", "link", "unlink", "rename", "replace", "mkdir", "listdir", "stat")
        slow_down(calls, float(os.environ["FILES_TAKE"]))
    slow_steps(Path(os.environ["SLOWED_BY"]))
