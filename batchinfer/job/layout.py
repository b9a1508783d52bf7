"""How a node's GPUs are used: so many replicas of so many ranks. All ways are weighed, the fastest for the input is chosen.

Where there is no input to look at (a bench, a profile) a standard work stands for it. The choice depends on the request, its
input and this code alone, so that all submissions of a run choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchinfer import hardware
from batchinfer.config import Config, ConfigError, HardwareConfig, check_together, show
from batchinfer.memory import MemoryPlan, divides, max_model_len, plan_memory
from batchinfer.model.config import ModelShape, resolve_dtype
from batchinfer.prediction import Demand, Prediction, predict, unpredictable
from batchinfer.roofline import Work

STANDARD_ROWS = 1024  # for each GPU of a node
STANDARD_PROMPT, STANDARD_COMPLETION = (64, 1024), (64, 512)  # tokens, spread evenly: those of the bench's `mixed`


@dataclass(frozen=True)
class Layout:
    """A node cut into replicas: `hw` with its ranks as a fact, what a rank's memory holds, and how long the work takes."""

    hw: HardwareConfig
    memory: MemoryPlan
    prediction: Prediction | None  # None: it does not fit, or nothing can be said

    @property
    def ranks(self) -> int:
        return int(self.hw.tensor_parallel)

    @property
    def replicas(self) -> int:
        """Of a node, or of the nodes that one spans."""
        return self.hw.gpus_per_node * self.hw.nodes_per_replica // self.ranks


def layouts(config: Config, shape: ModelShape, demand: Demand | None = None) -> list[Layout]:
    """Every layout of a node of `config.hw`, the fewest ranks first. Raises ConfigError for what cannot be.

    On a CPU the one that was asked for, which is a replica a process unless said otherwise.
    """
    hw = resolve_gpu(config.hw)
    check_together(replace(config, hw=hw), planning=True)
    if hw.tensor_parallel != "auto":
        shape.local_sizes(int(hw.tensor_parallel))
    dtype, length = resolve_dtype(config.model.dtype, shape, hw.gpu is not None), max_model_len(config.model, shape)
    tiers = [replace(hw, tensor_parallel=ranks) for ranks in _widths(hw, shape)]
    plans = [plan_memory(shape, dtype, tier, config.engine, length) for tier in tiers]
    asked = demand or standard_demand(hw.gpus_per_node * config.launcher.nodes, length)

    def predicted(tier: HardwareConfig, memory: MemoryPlan) -> Prediction | None:
        if not memory.fits or not asked.sequences or unpredictable(shape, dtype, tier, config.engine):
            return None
        return predict(shape, dtype, tier, config.engine, memory.kv_tokens, asked, config.launcher.nodes)

    return [Layout(tier, memory, predicted(tier, memory)) for tier, memory in zip(tiers, plans, strict=True)]


def _widths(hw: HardwareConfig, shape: ModelShape) -> list[int]:
    """Ranks of a replica: what divides both the node and the model; all GPUs of the nodes that a replica spans."""
    if hw.nodes_per_replica > 1:
        shape.local_sizes(ranks := hw.nodes_per_replica * hw.gpus_per_node)
        return [ranks]
    if hw.gpu is None:
        return [1 if hw.tensor_parallel == "auto" else int(hw.tensor_parallel)]
    return [ranks for ranks in range(1, hw.gpus_per_node + 1) if hw.gpus_per_node % ranks == 0 and divides(shape, ranks)]


def choose(hw: HardwareConfig, found: Sequence[Layout]) -> Layout:
    """What `hw.tensor_parallel` says; for auto the highest throughput predicted, or where nothing is predicted the fewest ranks
    that fit (fewer ranks talk less). When nothing fits the most ranks, as they are the nearest to it."""
    if hw.tensor_parallel != "auto":
        return next(layout for layout in found if layout.ranks == hw.tensor_parallel)
    fitting = [layout for layout in found if layout.memory.fits]
    if not fitting:
        return found[-1]
    return max(fitting, key=lambda layout: layout.prediction.tokens_out_s if layout.prediction else 0.0)  # of equals the first


def standard_demand(gpus: int, max_model_len: int) -> Demand:
    """Rows of many lengths, in an order that mixes them and is always the same; shorter where the model is."""
    prompts = [min(_spread(*STANDARD_PROMPT, 389 * i), max_model_len - 1) for i in range(STANDARD_ROWS)]
    completions = [min(_spread(*STANDARD_COMPLETION, 157 * i), max_model_len - prompts[i]) for i in range(STANDARD_ROWS)]
    return Demand(Work(0, tuple(prompts), tuple(completions)), STANDARD_ROWS * gpus)


def _spread(low: int, high: int, at: int) -> int:
    return low + at % (high - low + 1)


def resolve_gpu(hw: HardwareConfig) -> HardwareConfig:
    """`hw` with its GPU as a fact instead of `auto`: the smallest that this host shows, null where it shows none."""
    if hw.gpu != "auto":
        return hw
    seen = hardware.visible_gpus()
    if not seen:
        return replace(hw, gpu=None)
    if hw.gpus_per_node > len(seen):
        raise ConfigError(f"{show('hw.gpus_per_node', hw.gpus_per_node)}: must be at most {len(seen)}, the GPUs of this host")
    return replace(hw, gpu=min(seen, key=lambda gpu: gpu.memory_bytes).gpu)
