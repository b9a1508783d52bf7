"""Does it fit: the arithmetic of weights, activations and KV cache, before any GPU is touched.

The engine measures what is really left and asks `kv_blocks` the same question; here the numbers are estimated from shapes.
Which layout of a node is best is not decided here (`job.layout`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from batchinfer import hardware
from batchinfer.config import ConfigError, EngineConfig, HardwareConfig, ModelConfig, show
from batchinfer.model.config import DTYPE_BYTES, ModelShape

GIB = hardware.GIB
# CUDA context, libraries, what the allocator cannot hand out again. On an H200 0.97 GiB went to this and to the working memory
# together, of which 0.42 are derived here (docs/performance.md).
CUDA_CONTEXT = 5 * GIB // 8
COMMUNICATION = GIB // 2  # NCCL's channels and buffers that peers map, of one replica
CPU_CONTEXT = GIB // 4  # torch and pyarrow once loaded
GRAPH_TOKENS, GRAPH_SPACING = 512, 24  # `engine.cuda_graphs`: up to so many tokens at least; sizes lie so far apart in the mean
SHORTEST_ADVICE = 128  # tokens of a sequence: to fit only shorter ones is no help
MOST_RANKS = 8  # GPUs of the largest node that is advised


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank's memory goes to, in bytes, and how many tokens of KV cache are left."""

    device: str
    tensor_parallel: int
    max_model_len: int
    block_size: int
    device_bytes: int
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int  # working memory of the largest step, logits included
    context_bytes: int
    communication_bytes: int
    graph_bytes: int  # not of the usable bytes: captured when the cache exists, out of what is left beside them
    kv_bytes_per_token: int
    num_blocks: int
    advice: str  # what would make it fit; empty when it does

    @property
    def overhead_bytes(self) -> int:
        return self.context_bytes + self.communication_bytes

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def concurrent_sequences(self) -> int:
        """How many sequences of the greatest length fit at once."""
        return self.num_blocks // _blocks_of(self.max_model_len, self.block_size)

    @property
    def fits(self) -> bool:
        """One sequence of the greatest length must be able to run to its end."""
        return self.concurrent_sequences > 0

    @property
    def total_bytes(self) -> int:
        """Of everything, the captured graphs too."""
        return self.weight_bytes + self.activation_bytes + self.overhead_bytes + self.kv_bytes + self.graph_bytes

    @property
    def left_bytes(self) -> int:
        """For the KV cache; below 0 where even the rest does not fit."""
        return self.usable_bytes - self.weight_bytes - self.activation_bytes - self.overhead_bytes

    @property
    def sequence_bytes(self) -> int:
        """KV cache of one sequence of the greatest length, in whole blocks."""
        return _blocks_of(self.max_model_len, self.block_size) * self.block_size * self.kv_bytes_per_token

    def explain(self) -> str:
        """One sentence: that it fits, or what is missing and what would help."""
        have = f"of {gib(self.device_bytes)} on {self.device} with hw.tensor_parallel={self.tensor_parallel}"
        if self.fits:
            need = f"{gib(self.weight_bytes)} of weights and {self.kv_tokens:,} tokens of KV cache"
            return f"{need} fit into {gib(self.usable_bytes)} {have}"
        working, sequence = self.activation_bytes + self.overhead_bytes, self.sequence_bytes
        return (
            f"{gib(self.weight_bytes)} of weights, {gib(working)} of working memory and {gib(sequence)} of KV cache for one "
            f"sequence of {self.max_model_len:,} tokens do not fit into {gib(self.usable_bytes)} {have}; {self.advice}"
        )


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / (1 << 20):,.1f} MiB"


def max_model_len(model: ModelConfig, shape: ModelShape) -> int:
    """Longest prompt + completion: what was asked for, else what the checkpoint was made for. Raises ConfigError.

    What rope scaling reaches beyond max_position_embeddings is there for the asking.
    """
    made_for, longest = shape.max_position_embeddings, shape.max_sequence_length
    if model.max_model_len is not None and model.max_model_len > longest:
        limit = "what the model's rope scaling reaches" if longest > made_for else "the model's max_position_embeddings"
        raise ConfigError(f"{show('model.max_model_len', model.max_model_len)}: must be at most {longest}, {limit}")
    return model.max_model_len or made_for


def plan_memory(shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig, max_model_len: int) -> MemoryPlan:
    """Memory of one rank. `hw` is resolved; `dtype` is not auto. Raises ConfigError for a GPU that nobody knows."""
    plan = _plan(shape, dtype, hw, engine, max_model_len)
    return plan if plan.fits else replace(plan, advice=_advice(plan, shape, dtype, hw, engine))


def kv_blocks(
    free_bytes: int, shape: ModelShape, dtype: str, tensor_parallel: int, engine: EngineConfig, max_model_len: int
) -> int:
    """Blocks of KV cache for `free_bytes` of one rank, and never more than `max_num_seqs` longest sequences can use."""
    block_bytes = engine.block_size * shape.kv_bytes_per_token(dtype, tensor_parallel)
    useful = engine.max_num_seqs * _blocks_of(max_model_len, engine.block_size)
    return max(0, min(free_bytes // block_bytes, useful))


def _plan(shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig, max_model_len: int) -> MemoryPlan:
    ranks = int(hw.tensor_parallel)
    device_bytes = _device_bytes(hw)
    usable = int(device_bytes * engine.gpu_memory_utilization)
    weights = shape.weight_bytes(dtype, ranks)
    activations = _activation_bytes(shape, dtype, ranks, engine)
    context = CPU_CONTEXT if hw.gpu is None else CUDA_CONTEXT
    communication = COMMUNICATION if hw.gpu is not None and ranks > 1 else 0
    free = usable - weights - activations - context - communication
    return MemoryPlan(
        device=hw.gpu or "a CPU process",
        tensor_parallel=ranks,
        max_model_len=max_model_len,
        block_size=engine.block_size,
        device_bytes=device_bytes,
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        context_bytes=context,
        communication_bytes=communication,
        graph_bytes=0 if hw.gpu is None else _graph_bytes(shape, dtype, ranks, engine),
        kv_bytes_per_token=shape.kv_bytes_per_token(dtype, ranks),
        num_blocks=kv_blocks(free, shape, dtype, ranks, engine, max_model_len),
        advice="",
    )


def _blocks_of(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _device_bytes(hw: HardwareConfig) -> int:
    """Memory of one rank: a GPU's, or its share of the host's."""
    if hw.gpu is None:
        host = hw.mem_gb * GIB if hw.mem_gb is not None else hardware.available_memory()
        return host // hw.gpus_per_node
    found = hardware.gpu_memory_bytes(hw.gpu)
    if found is None:
        known = ", ".join(hardware.GPUS)
        raise ConfigError(f"{show('hw.gpu', hw.gpu)}: must be auto, null, a GPU of this host, or one of {known}")
    return found


def _activation_bytes(shape: ModelShape, dtype: str, ranks: int, engine: EngineConfig) -> int:
    """Upper estimate of one layer's tensors for a full step, and of the float32 logits with two working copies."""
    logits = 3 * engine.max_num_seqs * shape.vocab_size * 4
    return engine.max_num_batched_tokens * _layer_bytes(shape, dtype, ranks) + logits


def _layer_bytes(shape: ModelShape, dtype: str, ranks: int) -> int:
    """Of a layer's tensors, for one token."""
    local = shape.local_sizes(ranks)
    attention = (2 * local.num_heads + 2 * local.num_kv_heads) * shape.head_dim
    return (3 * shape.hidden_size + attention + 3 * local.intermediate_size) * DTYPE_BYTES[dtype]


def _graph_bytes(shape: ModelShape, dtype: str, ranks: int, engine: EngineConfig) -> int:
    """Of the pool that captured steps share: a layer's tensors for the largest, and the hidden states that each leaves, two for
    every size. What the driver keeps for a graph is not known, and not in it."""
    if not engine.cuda_graphs:
        return 0
    largest = min(max(engine.max_num_seqs, GRAPH_TOKENS), engine.max_num_batched_tokens)
    hidden = largest**2 // GRAPH_SPACING * shape.hidden_size * DTYPE_BYTES[dtype]  # 2 x sizes x half of the largest
    return largest * _layer_bytes(shape, dtype, ranks) + hidden


def _advice(plan: MemoryPlan, shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig) -> str:
    """What would fit, the nearest first: shorter sequences, more ranks of the same GPU, other GPUs."""
    tokens = max(0, plan.left_bytes) // plan.kv_bytes_per_token // plan.block_size * plan.block_size
    options = [f"model.max_model_len={tokens}"] if tokens >= SHORTEST_ADVICE else []
    length = plan.max_model_len
    if hw.gpu is not None:
        wider = _fewest_ranks(shape, dtype, hw, engine, length)
        if wider is not None:
            node = "" if hw.gpus_per_node % wider == 0 else f" on a node of {wider} x {hw.gpu}"
            options.append(f"hw.tensor_parallel={wider}{node}")
        options += _other_gpus(shape, dtype, hw, engine, length)
    return f"{', or '.join(options)} would fit" if options else "it needs a device with more memory"


def _fewest_ranks(shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig, length: int) -> int | None:
    """Of this GPU that hold one sequence; powers of two, as nodes are built."""
    widths = [1 << i for i in range(MOST_RANKS.bit_length()) if divides(shape, 1 << i)]
    plans = (_plan(shape, dtype, replace(hw, tensor_parallel=ranks), engine, length) for ranks in widths)
    return next((plan.tensor_parallel for plan in plans if plan.fits), None)


def _other_gpus(shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig, length: int) -> Iterator[str]:
    """GPUs of the table with more memory, and how many of them."""
    have = _device_bytes(hw)
    for gpu in hardware.GPUS:
        other = replace(hw, gpu=gpu)
        ranks = _fewest_ranks(shape, dtype, other, engine, length) if _device_bytes(other) > have else None
        if ranks is not None:
            yield f"{ranks} x {gpu}"


def divides(shape: ModelShape, ranks: int) -> bool:
    try:
        shape.local_sizes(ranks)
    except ConfigError:
        return False
    return True
