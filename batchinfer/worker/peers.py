"""The other ranks of a replica as processes, and what this rank does when one of them dies: it ends too, at once.

Left alone, a rank waits for the dead one in a collective: NCCL and kernels that spin on a peer's flag wait for minutes or for
ever, and a host that waits for its device runs no Python handler of signals. torchrun notices a death in 0.1 s, sends the others
SIGTERM, and gives them 30 s that cannot be configured. So a thread looks after the others from the first signal on; it learns
of that through the file that Python's own handler, which is C and runs at any time, writes signals to. A stop on request begins
with the same signal, and then all of them live: the work is ended in order.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from batchinfer.config import ConfigError
from batchinfer.engine.ring import Peer, RingAddress
from batchinfer.job.replica import BEREAVED
from batchinfer.model.parallel import TensorParallel

LOOK_S = 0.05
PATIENCE_S = 5.0  # a connection breaks before its process is gone, by as long as the driver takes to free a GPU's memory


class PeerDied(RuntimeError):
    """This rank failed because another one had died: it is not the culprit."""


class Peers:
    """Those other ranks that are on this host."""

    def __init__(self, parallel: TensorParallel, others: Sequence[Peer]) -> None:
        self._parallel, self._others = parallel, others

    @classmethod
    def meet(cls, parallel: TensorParallel) -> Peers:
        """All ranks call this together."""
        if parallel.size == 1:
            return cls(parallel, [])
        here = RingAddress.here()
        found: list[tuple[tuple[str, str], Peer]] = [(here, Peer.here(parallel.rank))] * parallel.size
        dist.all_gather_object(found, found[0], group=parallel.host_group)
        return cls(parallel, [peer for place, peer in found if place == here and peer.rank != parallel.rank])

    def dead(self, within_s: float = 0.0) -> Peer | None:
        """One that is dead, or dies while it is waited for."""
        deadline = time.monotonic() + within_s
        while True:
            found = next((peer for peer in self._others if not peer.is_alive()), None)
            if found is not None or time.monotonic() >= deadline:
                return found
            time.sleep(LOOK_S)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, the death of a peer ends this process with BEREAVED. To be entered in the main thread.

        The caller handles SIGTERM in Python or not at all. PeerDied: in place of an error that came of such a death.
        """
        if not self._others:
            yield
            return
        over, (signals, wakeup) = threading.Event(), os.pipe()
        os.set_blocking(wakeup, False)
        before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        watch = threading.Thread(target=self._watch, args=(signals, over), name="peers", daemon=True)
        watch.start()
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            if dead := self.dead(PATIENCE_S):
                raise PeerDied(f"{dead} died before") from error
            raise
        finally:
            signal.set_wakeup_fd(before)
            over.set()
            os.write(wakeup, b"\0")
            watch.join()
            os.close(signals)
            os.close(wakeup)
        dist.barrier(self._parallel.host_group)  # nobody goes before nobody looks any more

    def _watch(self, signals: int, over: threading.Event) -> None:
        os.read(signals, 1)
        while not over.wait(LOOK_S):
            if dead := self.dead():
                print(f"{dead} died, and this rank ends with it", file=sys.stderr, flush=True)
                os._exit(BEREAVED)  # the main thread may never come back from where it waits
