"""How near to the memory's rate matrix products of few rows come, beside cuBLAS.

    python slurm/bench/kernels_linear.py [--rows 1,2,4,8,16,32]

Every figure is one graph of 32 layers with weights of their own (so that none comes from the L2 cache), the median of some
replays. `%` is of the streaming-read rate measured in the same run: the sum over 2 GiB. "chain" is the four products of all
layers; "step" is a decode step without attention: norms, products and activation, fused where `ops.skinny` fuses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchinfer.ops import reference_linear, skinny

LAYERS = 32
DTYPE = torch.bfloat16
Layers = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    kv: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "qkv": (self.hidden + 2 * self.kv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = (Model("Llama-2-7B", 4096, 11008, 4096), Model("Mistral-7B", 4096, 14336, 1024))


def median_us(body: Callable[[], object], replays: int = 9) -> float:
    """Of replays of `body` as a CUDA graph."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    times = []
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[2:])[replays // 2]


def read_rate() -> float:
    """Bytes a second of a sum over 2 GiB."""
    data = torch.empty(2**29, device="cuda").normal_()
    return 4 * 2**31 / median_us(lambda: [data.sum() for _ in range(4)]) * 1e6


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=DTYPE).normal_(0, scale)


def weights(shapes: dict[str, tuple[int, int]], layers: int) -> Layers:
    return [{name: draw(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()} for _ in range(layers)]


# What is timed. `ops` is our module or the reference, which calls cuBLAS.


def chain(layers: Layers, x: Tensor, ops: Any) -> None:
    for layer in layers:
        x = ops.linear(ops.linear(x, layer["qkv"])[:, : layer["o"].shape[1]], layer["o"])
        x = ops.linear(ops.linear(x, layer["gate_up"])[:, : layer["down"].shape[1]], layer["down"])


def alone(layers: Layers, name: str, x: Tensor, ops: Any) -> None:
    for layer in layers:
        ops.linear(x, layer[name])


def step(layers: Layers, x: Tensor, norm_weight: Tensor, ops: Any) -> None:
    residual = x
    for layer in layers:
        qkv, residual = ops.norm_linear(x, residual, norm_weight, 1e-5, layer["qkv"])
        x = ops.linear(qkv[:, : x.shape[1]], layer["o"])
        y, residual = ops.norm_linear_silu(x, residual, norm_weight, 1e-5, layer["gate_up"])
        x = ops.linear(y, layer["down"])


class Table:
    """Prints a line for each figure."""

    def __init__(self) -> None:
        self.read = read_rate()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, streaming read {self.read * 1e-12:.3f} TB/s")
        print(f"{'':32}{'rows':>5}{'ours us':>10}{'TB/s':>7}{'%':>7}{'cuBLAS us':>11}{'TB/s':>7}{'%':>7}")

    def compare(self, name: str, rows: int, size: int, body: Callable[[Any], object]) -> None:
        """Times `body` with our functions and with torch's; it reads `size` bytes of weights."""
        text = f"{name:32}{rows:5}"
        for ops, width in ((skinny, 10), (reference_linear, 11)):
            us = median_us(partial(body, ops))
            text += f"{us:{width}.1f}{size / us * 1e-6:7.3f}{100 * size / us * 1e6 / self.read:7.1f}"
        print(text, flush=True)


def measure(model: Model, rows: list[int], table: Table) -> None:
    layers = weights(model.shapes(), LAYERS)
    for m in rows:
        for name, (_, k) in model.shapes().items():
            body = partial(alone, layers, name, draw(m, k))
            table.compare(f"{model.name} {name}", m, sum(layer[name].nbytes for layer in layers), body)
        size, x = sum(weight.nbytes for layer in layers for weight in layer.values()), draw(m, model.hidden)
        table.compare(f"{model.name} chain", m, size, partial(chain, layers, x))
        table.compare(f"{model.name} step", m, size, partial(step, layers, x, draw(model.hidden)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    rows = [int(text) for text in parser.parse_args().rows.split(",")]
    table = Table()
    heads = weights({"lm_head": (32000, 4096)}, 8)
    for m in rows:
        body = partial(alone, heads, "lm_head", draw(m, 4096))
        table.compare("lm_head (8 of them)", m, sum(head["lm_head"].nbytes for head in heads), body)
    for model in MODELS:
        measure(model, rows, table)


if __name__ == "__main__":
    main()
