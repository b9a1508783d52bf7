"""The benchmark sweep of the original design: models x GPUs of a replica x batch x prompt length, a point at a time.

    python slurm/sweep.py --models llama7b llama13b --gpus 1 2 --out outputs/sweep hw=h200x2 model.load_format=random
    python slurm/sweep.py --models llama7b:/data/llama-2-7b-hf --gpus 1 2 4 --out outputs/sweep hw=a100x4
    python slurm/sweep.py --models tiny --gpus 1 --batches 1 2 --lengths 16 --output-len 8 --out outputs/sweep hw=cpu

Each point is one `python -m batchinfer bench`: so many requests of the same length, all at once, again and again. The first
`--warmup` repetitions do not count; of the next `--steps` the median does. What follows the options are overrides of every point.
The folder gets a JSON file for each point, `table.md`, and a picture for each model. A point that has its file is not run again,
so the same command goes on where it stopped; one that fails is a line in the table. Exit code 1: some failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from batchinfer.bench.points import Point, measure
from batchinfer.bench.results import OURS
from batchinfer.config import ConfigError

HEAD = ("model", "GPUs", "batch", "prompt", "out tok/s", "ms a token", "first token", "seconds", "times the floor")
METRICS = {"out_tok_s": "completion tokens/s", "token_ms": "ms between tokens", "first_token_ms": "ms to the first token"}


@dataclass(frozen=True)
class Place:
    """Where in the sweep a point lies. `model`: its name in conf/model, then a colon and a checkpoint where one is given."""

    model: str
    gpus: int
    batch: int
    length: int

    @property
    def model_name(self) -> str:
        return self.model.partition(":")[0]

    def point_name(self) -> str:
        return f"{self.model_name}_gpus{self.gpus}_batch{self.batch}_in{self.length}"

    def words(self, asked: argparse.Namespace) -> list[str]:
        path = self.model.partition(":")[2]
        return [
            f"model={self.model_name}",
            *([f"model.path={path}"] if path else []),
            f"hw.tensor_parallel={self.gpus}",
            f"bench.num_requests={self.batch}",
            f"bench.input_len={self.length}",
            f"bench.output_len={asked.output_len}",
            f"bench.repeat={asked.warmup + asked.steps}",
            "bench.warmup=0",
            "bench.peers=[]",
            *asked.overrides,
        ]


@dataclass(frozen=True)
class Figures:
    """Of the repetitions that count. Seconds are of a whole repetition, prefill included."""

    seconds: float
    shortest_s: float
    longest_s: float
    out_tok_s: float
    token_ms: float | None  # None where a request draws a single token
    first_token_ms: float
    times_floor: float

    @classmethod
    def of(cls, found: dict[str, Any], warmup: int) -> Figures:
        workload = found["workloads"]["custom"]
        ours, counted = workload[OURS], workload[OURS]["all_seconds"][warmup:]
        seconds, first_s = statistics.median(counted), ours["first_token_s"]
        draws = workload["tokens_out"] // workload["requests"]
        return cls(
            seconds,
            min(counted),
            max(counted),
            workload["tokens_out"] / seconds,
            1e3 * (ours["ran_seconds"] - first_s) / (draws - 1) if draws > 1 else None,  # both of the same repetition
            1e3 * first_s,
            seconds / workload["floor"]["sequential_s"],
        )


Measured = dict[Place, Figures | str]  # a text says why there are no figures


def sweep(asked: argparse.Namespace) -> Measured:
    found: Measured = {}
    for place in map(Place, *zip(*product(asked.models, asked.gpus, asked.batches, asked.lengths), strict=True)):
        point = measure(asked.out, place.point_name(), place.words(asked))
        found[place] = figures_or_reason(point, asked.warmup)
        said = found[place]
        print(f"{point.name}: {said if isinstance(said, str) else f'{said.out_tok_s:,.0f} tokens/s'}", flush=True)
    return found


def figures_or_reason(point: Point, warmup: int) -> Figures | str:
    return f"failed: {point.why}" if point.found is None else Figures.of(point.found, warmup)


def table(measured: Measured) -> Iterator[str]:
    yield f"| {' | '.join(HEAD)} |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|---:|"
    for place, figures in measured.items():
        cells = [place.model_name, f"{place.gpus}", f"{place.batch}", f"{place.length:,}"]
        rest = [figures, "", "", "", ""] if isinstance(figures, str) else list(_cells(figures))
        yield f"| {' | '.join([*cells, *rest])} |"


def _cells(found: Figures) -> Iterator[str]:
    yield f"{found.out_tok_s:,.1f}"
    yield "" if found.token_ms is None else f"{found.token_ms:,.2f}"
    yield f"{found.first_token_ms:,.1f} ms"
    yield f"{found.seconds:,.3f} ({found.shortest_s:,.3f} to {found.longest_s:,.3f})"
    yield f"{found.times_floor:,.2f}"


def plot(model: str, measured: Measured, file: Path) -> None:
    """Batches along, metrics down, GPUs across; a line for each prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = {place: found for place, found in measured.items() if place.model == model and isinstance(found, Figures)}
    gpus = sorted({place.gpus for place in points})
    size = (2.2 + 3.4 * len(gpus), 2.6 * len(METRICS))
    figure, grid = pyplot.subplots(
        len(METRICS), len(gpus), sharex=True, sharey="row", squeeze=False, figsize=size, layout="constrained"
    )
    for (metric, row), (column, count) in product(zip(METRICS, grid, strict=True), enumerate(gpus)):
        _lines(row[column], metric, {place: found for place, found in points.items() if place.gpus == count}, pyplot)
    for row, label in zip(grid, METRICS.values(), strict=True):
        row[0].set_ylabel(label)
        row[0].set_ylim(0, 1.08 * max(axes.dataLim.y1 for axes in row))  # the highest point is not cut by the frame
    for axes, count in zip(grid[0], gpus, strict=True):
        axes.set_title(f"{count} GPU{'s' if count > 1 else ''}")
    for axes in grid[-1]:
        axes.set_xlabel("requests at once")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), title="prompt tokens", loc="outside right upper")
    figure.suptitle(Place(model, 1, 1, 1).model_name)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _lines(axes: Any, metric: str, points: dict[Place, Figures], pyplot: Any) -> None:
    batches = sorted({place.batch for place in points})
    lengths = sorted({place.length for place in points})
    for shade, length in enumerate(lengths):
        chosen = {place.batch: found for place, found in points.items() if place.length == length}
        line = {batch: getattr(chosen[batch], metric) for batch in sorted(chosen)}
        color = pyplot.get_cmap("viridis")(0.9 * shade / max(1, len(lengths) - 1))
        axes.plot(list(line), list(line.values()), marker="o", color=color, label=f"{length:,}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.grid(alpha=0.3)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL[:CHECKPOINT]")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="ranks of a replica (processes with hw=cpu)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048], help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens to generate")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="of every point, as `python -m batchinfer bench` takes them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    asked = parse(sys.argv[1:] if argv is None else argv)
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        measured = sweep(asked)
    except ConfigError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    (asked.out / "table.md").write_text("\n".join(table(measured)) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("sweep: no pictures, as matplotlib is not installed", file=sys.stderr)
        asked.models = []
    for model in asked.models:
        if any(place.model == model and isinstance(found, Figures) for place, found in measured.items()):
            plot(model, measured, asked.out / f"{Place(model, 1, 1, 1).model_name}.png")
    print("\n" + "\n".join(table(measured)) + f"\n\n{asked.out}: table.md and a picture for each model")
    return 1 if any(isinstance(found, str) for found in measured.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
