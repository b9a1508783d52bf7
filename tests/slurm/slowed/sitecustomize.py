"""Found by the workers of a run that is to last: each step takes longer while the file named by SLOWED_WHILE exists.

So that something can happen in the middle of a run, however fast the machine is.
"""

import os
import sys
import time
from pathlib import Path

STEP_S = 0.1

if "batchinfer.worker" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    from batchinfer.worker.replica import Replica

    step, mark = Replica._step, Path(os.environ["SLOWED_WHILE"])

    def slowed(self: Replica, last: bool = False) -> None:
        step(self, last)
        if mark.exists():
            time.sleep(STEP_S)

    Replica._step = slowed  # type: ignore[method-assign]
