"""A rank that works for a while, and then hangs or ends."""

from __future__ import annotations

import threading
import time
from collections import deque

from batchinfer.job.vitals import Phase, Pulse


def hang() -> None:
    pulse = Pulse.here()
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    for step in range(5):
        pulse.beat(Phase.STEPPING, step)
    deque(iter(int, 1), maxlen=0)  # a loop in C, which ends never and costs no memory


def move(seconds: float) -> None:
    pulse, end = Pulse.here(), time.monotonic() + seconds
    while time.monotonic() < end:
        pulse.beat(Phase.STEPPING)
        time.sleep(0.1)
