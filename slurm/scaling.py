"""How a node's GPUs are best divided: whole runs, Parquet to Parquet, with one replica or several, of one rank or several.

    python slurm/scaling.py --layouts 1x1 2x1 4x1 2x2 1x4 --out outputs/scaling hw=h200x4 'bench.workload=[mixed]' \\
        model=llama7b model.load_format=random model.dtype=bfloat16 model.max_model_len=2048
    python slurm/scaling.py --layouts 1x1 2x1 --out outputs/scaling hw=cpu model=tiny

A layout is replicas x ranks of each, on as many GPUs. Every replica gets the whole workload that `bench.workload` names, each
with other tokens, so that none finds the prefixes of another: perfect scaling takes the same time however many there are. Each
layout is one `python -m batchinfer`, a run in a folder of its own; one that is complete is not run again, and one that was
stopped goes on. What follows the options are overrides of every run. The table counts from the first step of any replica to the
last; exit code 1: a run failed, or has error rows.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.bench.workloads import Workload, load_workloads
from batchinfer.compose import compose
from batchinfer.config import Config, ConfigError
from batchinfer.job.replica import last_words
from batchinfer.memory import max_model_len
from batchinfer.model.config import load_shape

HEAD = ("layout", "rows", "seconds", "out tok/s", "times the first", "of perfect", "predicted", "off", "tail")


@dataclass(frozen=True)
class Layout:
    replicas: int
    ranks: int

    @classmethod
    def parse(cls, text: str) -> Layout:
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r}: must be replicas x ranks, as 2x1")
        return cls(int(found[1]), int(found[2]))

    @property
    def gpus(self) -> int:
        return self.replicas * self.ranks

    def __str__(self) -> str:
        return f"{self.replicas}x{self.ranks}"


def write_inputs(folder: Path, workload: Workload, vocab_size: int, copies: int) -> list[Path]:
    """The workload once for each replica, every copy with its tokens moved on by one."""
    files = [folder / f"{workload.name}-{copy}.parquet" for copy in range(copies)]
    own = [{"max_tokens": request.max_tokens} for request in workload.requests]
    for copy, file in enumerate(files):
        token_ids = [[(token + copy) % vocab_size for token in request.token_ids] for request in workload.requests]
        pq.write_table(pa.table({"token_ids": pa.array(token_ids, pa.list_(pa.int32())), "sampling": own}), file)
    return files


def words(layout: Layout, folder: Path, files: Sequence[Path]) -> list[str]:
    return [
        f"hw.gpus_per_node={layout.gpus}",
        f"hw.tensor_parallel={layout.ranks}",
        "input=parquet",
        f"input.paths=[{','.join(str(file) for file in files[: layout.replicas])}]",
        "input.token_ids_column=token_ids",
        "input.sampling_column=sampling",
        "sampling.ignore_eos=true",
        "output.token_ids=true",
        "output.keep_columns=none",
        f"output.dir={folder / str(layout)}",
        "launcher=local",
    ]


def run(folder: Path, layout: Layout, overrides: Sequence[str]) -> dict[str, Any] | str:
    """The run's summary, or why there is none."""
    print(f"{layout}: running", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "batchinfer", *overrides], capture_output=True, text=True)
    if done.returncode != 0:
        return last_words(done.stderr) or f"exit code {done.returncode} without a word"
    summary: dict[str, Any] = json.loads((folder / str(layout) / "report" / "summary.json").read_bytes())
    return f"{summary['error_rows']:,} error rows" if summary["error_rows"] else summary


def table(found: dict[Layout, dict[str, Any] | str]) -> Iterator[str]:
    yield f"| {' | '.join(HEAD)} |"
    yield f"|---{'|---:' * (len(HEAD) - 1)}|"
    first = next(((layout, summary) for layout, summary in found.items() if not isinstance(summary, str)), None)
    for layout, summary in found.items():
        if isinstance(summary, str) or first is None:
            yield f"| {layout} | failed: {summary} |{' |' * (len(HEAD) - 2)}"
        else:
            yield f"| {' | '.join([str(layout), *_cells(layout, summary, *first)])} |"


def _cells(layout: Layout, summary: dict[str, Any], base: Layout, first: dict[str, Any]) -> Iterator[str]:
    rate = summary["tokens_out_s"]
    times = rate / first["tokens_out_s"]
    yield f"{summary['rows']:,}"
    yield f"{summary['wall_s']:,.2f}"
    yield f"{rate:,.0f}"
    yield f"{times:,.3f}"
    yield f"{times * base.gpus / layout.gpus:.1%}"
    predicted = summary["predicted"] and summary["predicted"]["tokens_out_s"]["predicted"]
    yield f"{predicted:,.0f}" if predicted else "-"
    yield f"{rate / predicted - 1:+.1%}" if predicted else "-"
    yield f"{summary['tail_s']:,.2f} s"


def workload_of(config: Config) -> tuple[Workload, int]:
    """The one that the config names, and the vocabulary. ConfigError: it names several, or the model cannot take it."""
    if config.bench.requests is None and len(config.bench.workload) != 1:
        raise ConfigError(f"bench.workload={config.bench.workload}: must be one workload here")
    shape = load_shape(config.model)
    (workload,) = load_workloads(config.bench, config.seed, shape.vocab_size, max_model_len(config.model, shape))
    return workload, shape.vocab_size


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", type=Layout.parse, required=True, metavar="REPLICASxRANKS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="of every run, as `python -m batchinfer` takes them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    asked = parse(sys.argv[1:] if argv is None else argv)
    folder = asked.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        workload, vocab_size = workload_of(compose(asked.overrides, planning=True))
    except ConfigError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    files = write_inputs(folder, workload, vocab_size, max(layout.replicas for layout in asked.layouts))
    found = {layout: run(folder, layout, [*words(layout, folder, files), *asked.overrides]) for layout in asked.layouts}
    said = "\n".join(table(found))
    (folder / "table.md").write_text(said + "\n")
    print(said)
    return 1 if any(isinstance(summary, str) for summary in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
