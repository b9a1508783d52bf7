"""First on the PYTHONPATH of a run, this makes one row deadly: a worker that has it in its engine ends as BATCHINFER_POISON says.

`{"prompt": its token ids, "how": "kill", "exit" or "hang"}`.
"""

import json
import os
import signal
import sys
import time


def poisoned() -> None:
    from batchinfer.engine.engine import Engine

    asked = json.loads(os.environ["BATCHINFER_POISON"])
    step = Engine.step

    def step_or_die(engine, last=False):
        if any(sequence.request.prompt_token_ids == asked["prompt"] for sequence in engine.sequences.values()):
            if asked["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif asked["how"] == "exit":
                sys.exit(7)
            time.sleep(1000)
        return step(engine, last)

    Engine.step = step_or_die


if "BATCHINFER_POISON" in os.environ and sys.orig_argv[1:4] == ["-u", "-m", "batchinfer.worker"]:
    poisoned()
