"""`python -m batchinfer.worker RUN_DIR [--replica NAME] [--submission N]`: one rank of one replica, started by torchrun.

Rank 0 owns claims, rows, tokenizer, scheduler and commits; the other ranks only follow its batches. The worker knows
neither Hydra nor SLURM: the run directory says what to do. Exit code 0: nothing is left to do; 3: it was asked to stop
(SIGTERM, SIGINT, `cancel`) and has given its claims back; 1: it failed, and said why in a line that begins `batchinfer:`;
4: another rank of its replica had died, which is the one to ask why; 5: it failed as every other try would; 6: there was no space
left for the run's files.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from batchinfer import hardware
from batchinfer.config import Config, ConfigError, from_dict
from batchinfer.engine.engine import build_engine, serve
from batchinfer.engine.model_runner import build_runner
from batchinfer.job.failure import cannot_write
from batchinfer.job.manifest import Manifest
from batchinfer.job.process import die_with_parent
from batchinfer.job.replica import BEREAVED, DONE, FULL, SENTENCE, STOPPED
from batchinfer.job.rundir import RunDir
from batchinfer.job.vitals import LastWord, Phase, Pulse
from batchinfer.job.walltime import WORK_UNTIL
from batchinfer.model.config import load_shape
from batchinfer.model.parallel import TensorParallel, init_distributed
from batchinfer.worker.environment import write_environment
from batchinfer.worker.faults import OUTSIDE, exit_code, sentence
from batchinfer.worker.peers import PeerDied, Peers
from batchinfer.worker.progress import Progress
from batchinfer.worker.replica import Assignment, Replica, process_age

log = logging.getLogger(__name__)

HAND_OVER_S = 0.0002  # for which a thread may hold the interpreter while the engine's thread asks for it; Python's: 0.005
COLLECT_AFTER = 50_000  # new objects that still live, instead of Python's 700: two steps of a large batch make as many


@dataclass(frozen=True)
class Arguments:
    run_dir: RunDir
    replica: str | None
    submission: int | None


def parse_arguments(argv: list[str]) -> Arguments:
    parser = argparse.ArgumentParser(prog="python -m batchinfer.worker", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--replica", help="name of the replica, its folder made already; default: a new one")
    parser.add_argument("--submission", type=int, help="the submission whose settings to use; default: those of the manifest")
    parsed = parser.parse_args(argv)
    return Arguments(RunDir(parsed.run_dir), parsed.replica, parsed.submission)


def effective_config(arguments: Arguments, manifest: Manifest) -> Config:
    """The frozen request with what this submission changed of hardware, engine and paths."""
    if arguments.submission is None:
        return manifest.config
    record = json.loads(arguments.run_dir.submission_json(arguments.submission).read_bytes())
    return from_dict(record["config"])


def choose_device(config: Config) -> torch.device:
    """The rank's own GPU where the tier has GPUs, else the CPU."""
    if config.hw.gpu is None or (config.hw.gpu == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available() or torch.cuda.device_count() <= local_rank:
        raise ConfigError(no_gpu(config, torch.cuda.device_count()))
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def no_gpu(config: Config, seen: int) -> str:
    """Why this rank has none, with the versions that have to fit each other."""
    driver = hardware.driver_version()
    found = f"NVIDIA driver {driver}" if driver else "no NVIDIA driver"
    return (
        f"hw.gpu={config.hw.gpu}: PyTorch {torch.__version__} for CUDA {torch.version.cuda} sees "
        f"{seen or 'no'} GPU{'s' if seen > 1 else ''} on {socket.gethostname()}, which has {found}; choose nodes with a driver "
        "that is new enough, or hw=cpu"
    )


def lead(
    arguments: Arguments,
    manifest: Manifest,
    config: Config,
    parallel: TensorParallel,
    peers: Peers,
    device: torch.device,
    pulse: Pulse,
) -> int:
    """Rank 0: from an empty process to the last commit. Returns the exit code."""
    name = arguments.replica or arguments.run_dir.new_replica("hand")
    work_until = float(os.environ.get(WORK_UNTIL, "inf"))
    assignment = Assignment(arguments.run_dir, manifest, config, name, arguments.submission, work_until)
    progress = Progress(arguments.run_dir, name)
    progress.phases["import"] = process_age()
    progress.start()
    try:
        with peers.watched():
            complete = work(assignment, parallel, device, progress, pulse)
            pulse.beat(Phase.ENDING)
        progress.enter("done" if complete else "stopped")
        return DONE if complete else STOPPED
    except BaseException as error:
        progress.is_outside = isinstance(error, OUTSIDE)
        progress.enter("failed", error=sentence(error))
        raise
    finally:
        progress.close()


def work(assignment: Assignment, parallel: TensorParallel, device: torch.device, progress: Progress, pulse: Pulse) -> bool:
    """Loads the model and runs units through it. True when the run is complete."""
    progress.enter("loading")
    pulse.beat(Phase.LOADING)
    shape = load_shape(assignment.config.model)
    engine = build_engine(assignment.config, shape, parallel, device)
    progress.phases |= engine.phases | {"ready": process_age()}
    keep_out_of_garbage_collection()
    step_before_all_else()
    try:
        replica = Replica(assignment, shape, engine, progress, pulse)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: replica.stop())
        return replica.run()
    finally:
        engine.close()


def follow(config: Config, parallel: TensorParallel, device: torch.device, pulse: Pulse) -> int:
    """Every other rank. Rank 0 says when to stop: a follower that went by itself would look like a crash."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: `Peers.watched` is to hear of it
    pulse.beat(Phase.LOADING)
    runner = build_runner(config, load_shape(config.model), parallel, device)
    keep_out_of_garbage_collection()
    serve(runner, pulse)
    return DONE


def keep_out_of_garbage_collection() -> None:
    """What lives now lives to the end, and steps make hardly any cycles: a full collection would only stop them for 0.2 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def step_before_all_else() -> None:
    """Threads that prepare rows and commit units soon make way for the one that steps, which lets go of the interpreter often."""
    sys.setswitchinterval(HAND_OVER_S)


def tell(error: Exception, run_dir: RunDir) -> int:
    """Why this rank fails: to its node, which hears it even when no disk takes it, and to its log. Returns the exit code."""
    code = exit_code(error, run_dir.root)
    words = cannot_write(run_dir, error) if code == FULL and isinstance(error, OSError) else sentence(error)
    LastWord(code, words).leave()
    with contextlib.suppress(OSError):
        print(f"{SENTENCE}{words}", file=sys.stderr, flush=True)  # first: a full disk may take no more than this
        traceback.print_exc()
    return code


def main(argv: list[str]) -> int:
    # SLURM's warning signal reaches every descendant of a job and by default kills; this process is told by its parent.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    die_with_parent()
    pulse = Pulse.here()
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {os.environ.get('RANK', '0')} %(name)s: %(message)s")
    try:
        manifest = Manifest.load(arguments.run_dir)
        config = effective_config(arguments, manifest)
        device = choose_device(config)
        parallel = init_distributed(device)
        peers = Peers.meet(parallel)
        if parallel.rank == 0:
            code = lead(arguments, manifest, config, parallel, peers, device, pulse)
        else:
            if arguments.replica and os.environ.get("GROUP_RANK", "0") != "0" and os.environ["LOCAL_RANK"] == "0":
                write_environment(arguments.run_dir, arguments.replica, config)  # of another node than rank 0's
            with peers.watched():
                code = follow(config, parallel, device, pulse)
        parallel.close()
        return code
    except PeerDied as error:
        log.error("%s", error, exc_info=error)
        os._exit(BEREAVED)  # at once: threads of a process group abort a process that exits in order
    except Exception as error:
        return tell(error, arguments.run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
