"""How long an input will take: the simulated steps of `roofline`, priced at what this engine makes of a GPU and its links.

One model of costs for all GPUs, models and works, fitted to the figures of one H200 in docs/performance.md and to nothing else:
products at a share of their roofline, the KV cache read at nearly the rate of the memory, small kernels by their bytes, a fixed
time a layer, and two all-reduces a layer where a replica has several ranks. Claims of anybody are no input. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from batchinfer.config import EngineConfig, HardwareConfig
from batchinfer.hardware import GPU, GPUS, Link, link_of
from batchinfer.model.config import DTYPE_BYTES, ModelShape
from batchinfer.roofline import Cost, Limits, Step, Work, on_line, simulate

# Of a product's roofline, by its operations a byte over those at which the GPU is balanced. Up to 16 rows our kernel
# (csrc/README.md), from 64 rows cuBLAS on an H200: 205, 639, 728, 763 TFLOP/s at 64, 256, 512, 1,024 rows; at 2,048 the mean of
# two cards' 675 and 792.
GEMM_SHARE = ((0.006, 0.97), (0.02, 0.95), (0.09, 0.91), (0.36, 0.75), (1.4, 0.84), (2.9, 0.95), (5.7, 1.0), (11.4, 0.94))
READ_SHARE = 0.93  # of the read rate, by attention of decode: 94 to 98.7 % alone (csrc/README.md)
PREFILL_SHARE = 0.4  # of the best product, by attention of prompts: 247 TFLOP/s at 4 x 500, 412 at 2,048 (csrc/README.md)
SMALL_SHARE = 0.85  # of the read rate, by norms, rotary positions and activations: 2.9 % of `mixed`
LAYER_S = 14e-6  # of every layer in every step: launches, latencies; from `single`, 0.472 s
HOST_S, HOST_ROW_S = 0.2e-3, 3e-6  # a step on the host, which overlaps with the device: 1.1 to 1.9 ms for 512 rows
WAVES = 4  # a replica with more rows than so many times those that run at once is simulated in part, and scaled up


@dataclass(frozen=True)
class Demand:
    """An input as the engine sees it: `sequences` like those of `sample`, in which every completion has its full length."""

    sample: Work
    sequences: int

    def of_replica(self, replicas: int) -> int:
        """Sequences of the busiest one."""
        return math.ceil(self.sequences / replicas)

    def rows(self, count: int) -> Work:
        """`count` sequences: spread over the sample, which is gone through again where they are more."""
        size = len(self.sample.prompts)
        places = [i % size if count > size else i * size // count for i in range(count)]
        prompts, completions = self.sample.prompts, self.sample.completions
        return Work(self.sample.prefix, tuple(prompts[i] for i in places), tuple(completions[i] for i in places))

    def at_once(self, limits: Limits) -> int:
        """Sequences that run together when there are enough of them."""
        mean = (sum(self.sample.prompts) + sum(self.sample.completions)) / len(self.sample.prompts)
        full = math.ceil(limits.kv_tokens / mean)
        return full if limits.max_seqs is None else min(full, limits.max_seqs)

    @property
    def completion_tokens(self) -> float:
        return sum(self.sample.completions) / len(self.sample.completions) * self.sequences


@dataclass(frozen=True)
class Prediction:
    """Of a whole input on all replicas, from the first step to the last."""

    seconds: float
    completion_tokens: float
    sequences: int
    gpus: int

    @property
    def tokens_out_s(self) -> float:
        return self.completion_tokens / self.seconds

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.gpus

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_out_s": self.tokens_out_s, "gpu_hours": self.gpu_hours}


def unpredictable(shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig) -> str | None:
    """Why nothing can be said of the time, as a clause; None when something can."""
    if hw.gpu is None:
        return "on a CPU"
    if hw.nodes_per_replica > 1:
        return "the network between the nodes of a replica is not known"
    if hw.gpu not in GPUS:
        return f"the speed of {hw.gpu} is not known"
    if dtype not in ("bfloat16", "float16"):
        return f"known for bfloat16 and float16, not for {dtype}"
    if engine.attention_backend != "auto" or not (engine.cuda_graphs and engine.overlap):
        return "known for engine=throughput only"
    if shape.head_dim not in (64, 128) or shape.num_heads > 16 * shape.num_kv_heads or engine.block_size % 16:
        return "attention is left to plain PyTorch"  # as ops.attention_takes decides
    return None


def predict(
    shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig, kv_tokens: int, demand: Demand, nodes: int
) -> Prediction:
    """`hw` is resolved, its GPU in the table; `kv_tokens` those of a replica. `demand` holds at least one sequence."""
    ranks = int(hw.tensor_parallel)
    pricing = Pricing.of(shape, dtype, hw)
    limits = Limits(kv_tokens, engine.max_num_batched_tokens, engine.max_num_seqs)
    count = demand.of_replica(nodes * hw.gpus_per_node // ranks)
    some = WAVES * demand.at_once(limits)
    seconds = pricing.seconds(demand.rows(min(count, some)), limits)
    if count > some:  # what more rows take when the engine is in its stride: neither its filling nor its emptying
        a_row = (seconds - pricing.seconds(demand.rows(some // 2), limits)) / (some - some // 2)
        seconds += (count - some) * a_row
    return Prediction(seconds, demand.completion_tokens, demand.sequences, nodes * hw.gpus_per_node)


@dataclass(frozen=True)
class Pricing:
    """What a step takes on one rank."""

    cost: Cost
    gpu: GPU
    link: Link
    ranks: int
    num_layers: int
    small_bytes: float  # that norms, rotary positions and activations read and write for one token

    @classmethod
    def of(cls, shape: ModelShape, dtype: str, hw: HardwareConfig) -> Pricing:
        assert hw.gpu is not None, "a CPU has no price"
        ranks = int(hw.tensor_parallel)
        local = shape.local_sizes(ranks)
        heads = (2 * local.num_heads + 4 * local.num_kv_heads) * shape.head_dim  # queries and keys turned, keys and values stored
        small = shape.num_layers * (8 * shape.hidden_size + heads + 3 * local.intermediate_size) * DTYPE_BYTES[dtype]
        link = link_of(hw.gpu, hw.interconnect)
        return cls(Cost.of(shape, dtype, ranks), GPUS[hw.gpu], link, ranks, shape.num_layers, small)

    def seconds(self, work: Work, limits: Limits) -> float:
        """Of all its steps."""
        return sum(step.repeats * self.step_seconds(step, work.prefix) for step in simulate(work, self.cost, limits))

    def step_seconds(self, step: Step, prefix: int) -> float:
        """The device's time, or the host's where that is longer. `prefix`: tokens that all rows begin with."""
        return max(sum(self.parts(step, prefix)), HOST_S + HOST_ROW_S * step.running)

    def parts(self, step: Step, prefix: int) -> Iterator[float]:
        """Products, attention, small kernels, all-reduces, and what every layer takes."""
        read, gemm = self.gpu.read_gb_s * 1e9, self.gpu.gemm_tflops * 1e12
        roofline = max(self.cost.weight_bytes(step.outputs) / read, self.cost.gemm_ops(step.tokens, step.outputs) / gemm)
        balance = gemm / read
        yield roofline / on_line(GEMM_SHARE, 2 * step.tokens / self.cost.param_bytes / balance)
        multiplied = step.prefill_ops + self.cost.attention_ops * prefix * step.running  # a prefix is read once, by all rows
        yield step.keys * self.cost.kv_bytes / (read * READ_SHARE) + multiplied / (gemm * PREFILL_SHARE)
        yield step.tokens * self.small_bytes / (read * SMALL_SHARE)
        yield self.cost.all_reduces * all_reduce_seconds(self.link, step.tokens * self.cost.hidden_bytes, self.ranks)
        yield self.num_layers * LAYER_S


def all_reduce_seconds(link: Link, num_bytes: float, ranks: int) -> float:
    """A rank sends and receives 2 (n - 1) / n of the bytes (Patarasuk and Yuan, 2009), after the latency of the shortest."""
    moved = 2 * (ranks - 1) / ranks * num_bytes
    return (link.latency_us + (ranks - 2) * link.hop_us) * 1e-6 + moved / (link.reached_gb_s * 1e9)
