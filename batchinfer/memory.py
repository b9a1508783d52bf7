"""Does it fit: the arithmetic of weights, activations and KV cache, before any GPU is touched.

The engine measures what is really left and asks `kv_blocks` the same question; here the numbers are estimated from shapes.
Also turns a hardware tier with `auto` in it into facts, since how many ranks a replica needs is a question of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchinfer import hardware
from batchinfer.config import Config, ConfigError, EngineConfig, HardwareConfig, ModelConfig, check_together, show
from batchinfer.model.config import DTYPE_BYTES, ModelShape, resolve_dtype

GIB = hardware.GIB
CUDA_OVERHEAD = GIB  # context, cuBLAS workspaces, what the allocator cannot hand out again
NCCL_OVERHEAD = GIB // 2  # channel buffers of one communicator
CPU_OVERHEAD = GIB // 4  # torch and pyarrow once loaded


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
    activation_bytes: int
    overhead_bytes: int
    kv_bytes_per_token: int
    num_blocks: int
    advice: str  # what would make it fit; empty when it does

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

    def explain(self) -> str:
        """One sentence: that it fits, or what is missing and what would help."""
        have = f"of {gib(self.device_bytes)} on {self.device} with hw.tensor_parallel={self.tensor_parallel}"
        if self.fits:
            need = f"{gib(self.weight_bytes)} of weights and {self.kv_tokens:,} tokens of KV cache"
            return f"{need} fit into {gib(self.usable_bytes)} {have}"
        working, sequence = self.activation_bytes + self.overhead_bytes, self.max_model_len * self.kv_bytes_per_token
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
    overhead = CPU_OVERHEAD if hw.gpu is None else CUDA_OVERHEAD + (NCCL_OVERHEAD if ranks > 1 else 0)
    return MemoryPlan(
        device=hw.gpu or "a CPU process",
        tensor_parallel=ranks,
        max_model_len=max_model_len,
        block_size=engine.block_size,
        device_bytes=device_bytes,
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        overhead_bytes=overhead,
        kv_bytes_per_token=shape.kv_bytes_per_token(dtype, ranks),
        num_blocks=kv_blocks(usable - weights - activations - overhead, shape, dtype, ranks, engine, max_model_len),
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
    local = shape.local_sizes(ranks)
    attention = (2 * local.num_heads + 2 * local.num_kv_heads) * shape.head_dim
    per_token = 3 * shape.hidden_size + attention + 3 * local.intermediate_size
    logits = 3 * engine.max_num_seqs * shape.vocab_size * 4
    return engine.max_num_batched_tokens * per_token * DTYPE_BYTES[dtype] + logits


def _advice(plan: MemoryPlan, shape: ModelShape, dtype: str, hw: HardwareConfig, engine: EngineConfig) -> str:
    left = plan.usable_bytes - plan.weight_bytes - plan.activation_bytes - plan.overhead_bytes
    tokens = left // plan.kv_bytes_per_token // plan.block_size * plan.block_size
    options = [f"model.max_model_len={tokens}"] if tokens >= 2 else []
    wider = next(
        (
            ranks
            for ranks in (2, 4, 8)
            if hw.gpu
            and ranks > plan.tensor_parallel
            and _divides(shape, ranks)
            and _plan(shape, dtype, replace(hw, tensor_parallel=ranks), engine, plan.max_model_len).fits
        ),
        None,
    )
    if wider is not None:
        room = "" if wider <= hw.gpus_per_node else f" on a tier with {wider} GPUs a node"
        options.append(f"hw.tensor_parallel={wider}{room}")
    return f"{' or '.join(options)} would fit" if options else "it needs a device with more memory"


def _divides(shape: ModelShape, ranks: int) -> bool:
    try:
        shape.local_sizes(ranks)
    except ConfigError:
        return False
    return True


def resolve_hw(config: Config, shape: ModelShape) -> HardwareConfig:
    """`config.hw` with gpu and tensor_parallel as facts instead of `auto`. Raises ConfigError.

    Automatic tensor parallelism is the smallest divisor of gpus_per_node with which the model fits: fewer ranks talk less.
    """
    hw = _resolve_gpu(config.hw)
    check_together(replace(config, hw=hw), planning=True)
    if hw.tensor_parallel != "auto":
        shape.local_sizes(int(hw.tensor_parallel))
        return hw
    if hw.gpu is None:
        return replace(hw, tensor_parallel=1)
    return _smallest_that_fits(config, shape, hw)


def _smallest_that_fits(config: Config, shape: ModelShape, hw: HardwareConfig) -> HardwareConfig:
    dtype = resolve_dtype(config.model.dtype, shape, on_gpu=True)
    length = max_model_len(config.model, shape)
    divisors = [ranks for ranks in range(1, hw.gpus_per_node + 1) if hw.gpus_per_node % ranks == 0 and _divides(shape, ranks)]
    tiers = [replace(hw, tensor_parallel=ranks) for ranks in divisors]
    fitting = (tier for tier in tiers if _plan(shape, dtype, tier, config.engine, length).fits)
    return next(fitting, tiers[-1])


def _resolve_gpu(hw: HardwareConfig) -> HardwareConfig:
    if hw.gpu != "auto":
        return hw
    seen = hardware.visible_gpus()
    if not seen:
        return replace(hw, gpu=None)
    if hw.gpus_per_node > len(seen):
        raise ConfigError(f"{show('hw.gpus_per_node', hw.gpus_per_node)}: must be at most {len(seen)}, the GPUs of this host")
    return replace(hw, gpu=min(seen, key=lambda gpu: gpu.memory_bytes).gpu)
