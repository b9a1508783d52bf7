"""A fault campaign: runs that everything befalls, and in the end every row is there once, with the text of an undisturbed run.

    python -m tests.campaign.campaign --minutes 20              # a round after the other, each on a run of its own
    python -m tests.campaign.campaign --seed 7 --rounds 1       # again, what a report names

A round starts the same job again and again: with one or two replicas, or one of two ranks, in processes of one host. Each
time another fault comes at a random moment (`faults`), some together. When all kinds have been, whatever is wrong with
the host is put right, and a `resume` has to finish the run. In float64, where no rounding can make a text differ.

What hit no job, because none was at work yet or any more, does not count, and is tried again. A seed settles what comes in
which order; when, to the millisecond, and so which process is struck, it does not. A round that fails leaves its run where it
says.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import batchinfer
from tests.campaign import faults
from tests.campaign.faults import BLOWS, KINDS, LEAVINGS, SURROUNDINGS, Site, until
from tests.run.jobs import ROOT, Key, environment, kill, processes_of, rows, texts, wait_until_gone
from tests.run.jobs import batchinfer as command_line

HOST = Path(__file__).parents[1] / "run/host"
SHARDS, ROWS_PER_SHARD = 4, 48
TRIES = 3  # for each kind to hit, in a round
STEP_S, WAITING_STEP_S = 0.1, 0.8  # longer, so that something can happen in the middle of a run, and is not too late
TIERS = (["hw.gpus_per_node=1"], ["hw.gpus_per_node=2", "hw.tensor_parallel=1"], ["hw.gpus_per_node=2", "hw.tensor_parallel=2"])
Texts = dict[Key, tuple[object, ...]]


@dataclass
class Report:
    hits: Counter[str] = field(default_factory=Counter)
    misses: int = 0  # that were tried in vain
    rounds: int = 0
    attempts: int = 0
    rows: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    problems: list[str] = field(default_factory=list)
    skipped: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.doubled or self.different or self.problems)

    def compare(self, expected: Texts, committed: list[tuple[Key, tuple[object, ...]]]) -> None:
        """The rows of a run that has come to its end."""
        found = dict(committed)
        self.rows += len(expected)
        self.lost += len(expected.keys() - found.keys())
        self.doubled += len(committed) - len(found)
        self.different += sum(expected.get(key) != row for key, row in found.items())

    def lines(self) -> Iterator[str]:
        for kind in KINDS:
            yield f"  {kind:20} {'could not be: nothing can be mounted here' if kind in self.skipped else self.hits[kind]:>6}"
        yield f"{self.rounds} rounds, {self.attempts} jobs, {sum(self.hits.values())} faults that hit, {self.misses} that did not"
        yield f"{self.rows:,} rows: lost {self.lost}, doubled {self.doubled}, different {self.different}"
        yield from self.problems


class Campaign:
    """`folder` holds the inputs, and the runs of one round after the other."""

    def __init__(self, folder: Path):
        self.site, self.report = Site(folder), Report()
        self._slowed_by, self._logs = folder / "slowed", folder / "logs"
        self._logs.mkdir()
        write_inputs(self.site.inputs)
        self.report.skipped = () if self.site.is_mounted else faults.NEED_A_MOUNT
        self._expected = self._undisturbed(folder / "undisturbed")

    def request(self, run_dir: Path) -> list[str]:
        return [
            "hw=cpu",
            "hw.cpus_per_gpu=1",
            "input=parquet",
            f"input.paths=['{self.site.inputs}']",
            "input.prompt_column=prompt",
            "input.rows_per_unit=4",
            "model.dtype=float64",
            "sampling.temperature=0.8",
            "sampling.max_tokens=16",
            "output.token_ids=true",
            "engine.max_num_seqs=8",
            "engine.max_num_batched_tokens=128",
            "engine.stall_timeout_s=3",
            f"output.dir={run_dir}",
        ]

    def _undisturbed(self, run_dir: Path) -> Texts:
        done = command_line(*self.request(run_dir), "launcher=inline")
        assert done.returncode == 0, done.stdout + done.stderr
        return texts(run_dir)

    def round(self, seed: int, kinds: Sequence[str] = KINDS) -> None:
        """One run, which each of these kinds hits once, unless it is over before."""
        dice, log = random.Random(seed), self._logs / f"{seed}.txt"
        left = [kind for kind in kinds if kind not in self.report.skipped]
        for _ in range(TRIES):
            for blow, others in plan(left, dice) if left else ():
                say(f"seed {seed}: {', '.join([*others, *([blow] if blow else [])])}")
                hits = self._attempt(blow, others, dice, log)
                self.report.hits.update(hits)
                self.report.misses += len({blow, *others} - {None} - hits)
                left = [kind for kind in left if kind not in hits]
        self._slowed_by.unlink(missing_ok=True)
        self._finish(seed)
        self.report.rounds += 1
        if self.report.is_good:
            shutil.rmtree(self.site.run_dir)

    def _attempt(self, blow: str | None, others: list[str], dice: random.Random, log: Path) -> set[str]:
        """A job, or two, what befalls them, and their end. Returns the kinds that hit."""
        self._slow(STEP_S)
        jobs = [self._start(dice, around, log) for around in faults.surroundings(others, dice)]
        self._wait_for_the_moment(dice, jobs)
        are_at_work = bool(faults.workers(self.site)) and all(job.poll() is None for job in jobs)
        hits = {kind for kind in others if kind in SURROUNDINGS and are_at_work}
        with BLOWS[blow](self.site, dice) if blow else contextlib.nullcontext(False) as has_hit:
            if blow and has_hit:
                hits.add(blow)
        self._end(dice, jobs)
        if (self.site.run_dir / "manifest.json").exists():
            hits |= self._leave([kind for kind in others if kind in LEAVINGS], dice)
        return hits

    def _start(self, dice: random.Random, around: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        self.report.attempts += 1
        paths = os.pathsep.join([str(HOST), environment()["PYTHONPATH"]])
        variables = {**environment(), "PYTHONPATH": paths, "SLOWED_BY": str(self._slowed_by), **around}
        asked = [*self.request(self.site.run_dir), *dice.choice(TIERS), f"launcher={dice.choice(['inline', 'local'])}"]
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "batchinfer", *asked],
                env=variables, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def _wait_for_the_moment(self, dice: random.Random, jobs: list[subprocess.Popen[bytes]]) -> None:
        """Mostly in the middle of the work, sometimes before it."""
        if dice.random() < 0.2:
            time.sleep(dice.uniform(0, 6))
            return
        before, more = self._committed(), dice.randrange(1, 3)
        until(lambda: self._committed() >= before + more or all(job.poll() is not None for job in jobs), 90)
        self._slow(WAITING_STEP_S)
        time.sleep(dice.uniform(0, 1))

    def _slow(self, step_s: float) -> None:
        """From here on, each step takes so much longer."""
        new = self._slowed_by.with_suffix(".new")
        new.write_text(str(step_s))
        new.replace(self._slowed_by)

    def _committed(self) -> int:
        return len(list(self.site.run_dir.glob("completions/[0-9]*.parquet")))

    def _end(self, dice: random.Random, jobs: list[subprocess.Popen[bytes]]) -> None:
        """Ctrl-C, or a power cut."""
        if dice.random() < 0.4:
            for job in jobs:
                job.send_signal(signal.SIGINT)
            until(lambda: not processes_of(self.site.run_dir), 15)
        until(lambda: kill(sorted(processes_of(self.site.run_dir))) or not processes_of(self.site.run_dir), 15)
        for job in jobs:
            job.wait(timeout=15)

    def _leave(self, kinds: list[str], dice: random.Random) -> set[str]:
        hits = set()
        if faults.TORN_FILES in kinds and faults.leave_torn_files(self.site, dice):
            hits.add(faults.TORN_FILES)
        if faults.TORN_COMMIT in kinds and (name := faults.leave_a_torn_commit(self.site, dice)):
            hits.add(faults.TORN_COMMIT)
            said = command_line("verify", self.site.run_dir)
            if said.returncode != 1 or name not in said.stdout:
                self.report.problems.append(f"verify does not name {name}: {said.stdout}{said.stderr}")
            (self.site.run_dir / "completions" / name).unlink()
        return hits

    def _finish(self, seed: int) -> None:
        run_dir = self.site.run_dir
        begun = (run_dir / "manifest.json").exists()
        commands = [("resume", run_dir) if begun else (*self.request(run_dir), "launcher=inline"), ("verify", run_dir)]
        for command in commands:
            done = command_line(*command)
            if done.returncode != 0:
                self.report.problems.append(f"seed {seed}: {command[0]} exits {done.returncode}: {done.stdout}{done.stderr}")
        if left := wait_until_gone(run_dir, 15):
            self.report.problems.append(f"seed {seed}: a process outlives its run: {left}")
        self.report.compare(self._expected, rows(run_dir))


def plan(kinds: list[str], dice: random.Random) -> Iterator[tuple[str | None, list[str]]]:
    """Blows in a random order, a job for each; each of the other kinds goes with one of them."""
    blows: list[str | None] = [kind for kind in kinds if kind in BLOWS]
    dice.shuffle(blows)
    blows = blows or [None]
    others: list[list[str]] = [[] for _ in blows]
    for kind in kinds:
        if kind not in BLOWS:
            dice.choice(others[-2:] if kind == faults.TORN_COMMIT else others).append(kind)  # late enough for a commit
    yield from zip(blows, others, strict=True)


def write_inputs(folder: Path) -> None:
    """Shards with prompts of the shipped sample; no page of them decodes when it is damaged."""
    sample = Path(batchinfer.__file__).parent / "tiny/sample"
    prompts = pq.read_table(sample, columns=["prompt"])["prompt"].to_pylist()[: SHARDS * ROWS_PER_SHARD]
    folder.mkdir()
    for shard in range(SHARDS):
        own = prompts[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD]
        pq.write_table(pa.table({"prompt": own}), folder / f"{shard}.parquet", write_page_checksum=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; each has its own")
    parser.add_argument("--minutes", type=float, default=20, help="after which no round is begun")
    parser.add_argument("--rounds", type=int, default=sys.maxsize)
    parser.add_argument("--faults", default=",".join(KINDS), help="kinds, with commas")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if kind in options.faults.split(",")]
    folder, begin = Path(tempfile.mkdtemp(prefix="campaign-")), time.monotonic()
    campaign = Campaign(folder)
    while campaign.report.is_good and campaign.report.rounds < options.rounds and time.monotonic() < begin + 60 * options.minutes:
        campaign.round(options.seed + campaign.report.rounds, kinds)
    print("\n".join([f"seeds from {options.seed}, {time.monotonic() - begin:.0f} s", *campaign.report.lines()]))
    if not campaign.report.is_good:
        print(f"the run and the logs are kept in {folder}")
        return 1
    campaign.site.close()
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
