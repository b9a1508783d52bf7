"""The original design's performance table as ratios: Hugging Face on one GPU, tensor parallel 2 in plain PyTorch, the same
with our kernels, and what four GPUs are predicted to give; one request alone, 128 tokens in and 128 out.

    python slurm/bench/original_table.py --out outputs/original hw=h200x2 \\
        model=llama7b model.load_format=random model.dtype=bfloat16
    python slurm/bench/original_table.py --out outputs/original --lengths 16 8 hw=cpu hw.gpus_per_node=2 model=tiny

Each configuration is one `python -m batchinfer bench`, kept as JSON in the folder: what is there is not run again. The design
names absolute figures of other machines, so ratios to Hugging Face on one GPU are what can be compared.

The prediction: what two ranks took, less what four save by the planner's costs (`batchinfer/prediction.py`); so what it does
not count, launches and a host that is slower than the device, does not shrink. Where the tier has four GPUs, they are measured
instead. On GPUs that the planner does not know, and on CPUs, the table ends with two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batchinfer import prediction
from batchinfer.bench.points import Point, measure
from batchinfer.bench.results import NAIVE, OURS
from batchinfer.compose import compose
from batchinfer.config import Config, ConfigError
from batchinfer.job.plan import resolved
from batchinfer.model.config import load_shape
from batchinfer.prediction import Demand
from batchinfer.roofline import Work

PLAIN = ("engine.attention_backend=reference", "engine=eager")
# Tokens/s and ms to the first token that the design claims: Llama 2 7B on RTX 4090s, and on A100s for four.
CLAIMS = {"hf": (35, 120), "plain": (55, 85), "kernels": (65, 70), "plain4": (120, 40), "kernels4": (150, 30)}
NAMES = {
    "hf": "Hugging Face, one GPU",
    "plain": "tensor parallel 2, plain PyTorch",
    "kernels": "tensor parallel 2, our kernels",
    "plain4": "tensor parallel 4, plain PyTorch",
    "kernels4": "tensor parallel 4, our kernels",
}
RANKS, MORE = 2, 4
FIRST_TOKEN_MS = 100  # promised for every one of ours


@dataclass(frozen=True)
class Seen:
    tokens_s: float
    first_token_ms: float


def settings(asked: argparse.Namespace) -> list[str]:
    """Overrides that all configurations share."""
    prompt, output = asked.lengths
    lengths = [f"bench.input_len={prompt}", f"bench.output_len={output}", "bench.num_requests=1"]
    return [*lengths, f"bench.repeat={asked.steps}", *asked.overrides]


def run_all(asked: argparse.Namespace) -> dict[str, Point]:
    """Every configuration that the tier has the GPUs for. ConfigError: it has fewer than two."""
    gpus = compose(asked.overrides).hw.gpus_per_node
    if gpus < RANKS:
        raise ConfigError(f"hw.gpus_per_node={gpus}: must be at least {RANKS}, the ranks that are compared with one GPU")
    words = {"hf": ["hw.tensor_parallel=1", "bench.peers=[hf]"]}
    for ranks, suffix in ((RANKS, ""), (MORE, str(MORE))):
        if ranks <= gpus:
            ours = [f"hw.tensor_parallel={ranks}", "bench.peers=[]"]
            words |= {f"plain{suffix}": [*ours, *PLAIN], f"kernels{suffix}": ours}
    return {name: measure(asked.out, name, [*own, *settings(asked)]) for name, own in words.items()}


def seen_of(name: str, point: Point) -> Seen | None:
    """What was measured; None where it failed."""
    workload = (point.found or {"workloads": {"custom": {"peers": {}, OURS: None}}})["workloads"]["custom"]
    timing = workload["peers"].get(NAIVE) if name == "hf" else workload[OURS]
    return None if timing is None else Seen(timing["out_tok_s"], 1e3 * timing["first_token_s"])


def predict(point: Point, config: Config) -> Seen | None:
    """Of MORE ranks, from a point of RANKS. None where that failed."""
    if point.found is None:
        return None
    workload = point.found["workloads"]["custom"]
    own, prompt, output = workload[OURS], workload["tokens_in"], workload["tokens_out"]
    seconds = own["seconds"] - saved_s(config, prompt, output)
    return Seen(output / seconds, 1e3 * (own["first_token_s"] - saved_s(config, prompt, 1)))


def predictable(config: Config) -> bool:
    return prediction.unpredictable(load_shape(config.model), config.model.dtype, config.hw, config.engine) is None


def saved_s(config: Config, prompt: int, output: int) -> float:
    """By MORE ranks in place of RANKS, on one request."""
    shape, demand = load_shape(config.model), Demand(Work(0, (prompt,), (output,)), 1)
    fewer, more = (
        prediction.predict(shape, config.model.dtype, tier, config.engine, prompt + output, demand, 1).seconds
        for tier in (replace(config.hw, gpus_per_node=ranks, tensor_parallel=ranks) for ranks in (RANKS, MORE))
    )
    return fewer - more


def table(seen: dict[str, Seen | None], predicted: Sequence[str]) -> Iterator[str]:
    yield "| | design: tok/s | first token | times HF | here: tok/s | first token | times HF | first token, HF's over this |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    base = seen["hf"]
    for name in seen:
        tokens_s, first_ms = CLAIMS[name]
        claim = [f"{tokens_s}", f"{first_ms} ms", f"{tokens_s / CLAIMS['hf'][0]:.2f}"]
        label = f"{NAMES[name]}{' (predicted)' if name in predicted else ''}"
        yield f"| {' | '.join([label, *claim, *_cells(seen[name], base)])} |"


def _cells(own: Seen | None, base: Seen | None) -> Iterator[str]:
    if own is None:
        yield from ("failed", "", "", "")
        return
    yield f"{own.tokens_s:,.1f}"
    yield f"{own.first_token_ms:,.1f} ms"
    yield "" if base is None else f"{own.tokens_s / base.tokens_s:,.2f}"
    yield "" if base is None else f"{base.first_token_ms / own.first_token_ms:,.2f}"


def verdict(seen: dict[str, Seen | None]) -> str:
    slowest = max((own.first_token_ms for name, own in seen.items() if own is not None and name != "hf"), default=None)
    if slowest is None:
        return "no figures of ours"
    kept = "kept" if slowest < FIRST_TOKEN_MS else "NOT kept"
    return f"first token of ours after at most {slowest:,.1f} ms; under {FIRST_TOKEN_MS} ms everywhere is promised: {kept}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs=2, type=int, default=[128, 128], metavar=("IN", "OUT"))
    parser.add_argument("--steps", type=int, default=5, help="repetitions, of which the median counts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="of every configuration, as `python -m batchinfer bench` takes them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    asked = parse(sys.argv[1:] if argv is None else argv)
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        points = run_all(asked)
        seen = {name: seen_of(name, point) for name, point in points.items()}
        config = resolved(compose([f"hw.tensor_parallel={RANKS}", *settings(asked)]))
        predicted = [name for name in CLAIMS if name not in points] if predictable(config) else []
        seen |= {name: predict(points[name.removesuffix(str(MORE))], config) for name in predicted}
    except ConfigError as error:
        print(f"original_table: {error}", file=sys.stderr)
        return 2
    print("\n".join([*table(seen, predicted), "", verdict(seen)]))
    for name, point in points.items():
        if point.why is not None:
            print(f"{name}: failed: {point.why}", file=sys.stderr)
    return 1 if any(own is None for own in seen.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
