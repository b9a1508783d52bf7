"""Found by the workers of a run that is to last: each step takes longer, by the seconds in the file named by SLOWED_BY.

So that something can happen in the middle of a run, however fast the machine is. Without the file nothing is slowed.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

if "batchinfer.worker" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    from batchinfer.worker.replica import Replica

    step, by = Replica._step, Path(os.environ["SLOWED_BY"])

    def slowed(self: Replica, last: bool = False) -> None:
        step(self, last)
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(by.read_text()))

    Replica._step = slowed  # type: ignore[method-assign]
