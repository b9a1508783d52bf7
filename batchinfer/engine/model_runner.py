"""Executes batches on one rank: owns the model, the KV cache and how large it is.

Every rank of a tensor-parallel group has one. All compute the same batch and meet in the model's collectives; rank 0 draws
the tokens and brings them to its host. A step is launched in two parts, `forward` and `sample`, neither of which waits for the
device; what was drawn is waited for in `Drawn.result`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer import ops
from batchinfer.config import Config, EngineConfig
from batchinfer.engine.batch import Batch, BatchArrays, to_device
from batchinfer.engine.channel import BatchChannel, open_channel
from batchinfer.engine.cuda_graphs import CudaGraphs, graph_sizes
from batchinfer.engine.inputs import InputPacker, ModelInputs, PackedInputs
from batchinfer.engine.kv_memory import measure_kv_blocks, memory_in_words, require_fit
from batchinfer.engine.logprobs import prompt_log_probabilities, token_logprobs
from batchinfer.engine.rank_check import RankCheck
from batchinfer.engine.sampler import TokenMask, sample_tokens
from batchinfer.engine.sequence import NO_TOKEN, StepResult, TokenLogprobs
from batchinfer.memory import gib
from batchinfer.memory import max_model_len as max_model_len_of
from batchinfer.model.config import ModelShape, resolve_dtype
from batchinfer.model.decoder import Decoder
from batchinfer.model.layers import AttentionInputs
from batchinfer.model.loader import load_weights
from batchinfer.model.parallel import TensorParallel
from batchinfer.model.peer_exchange import connect

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A batch whose forward pass is launched."""

    step: BatchArrays[torch.Tensor]  # the batch on the device
    graph: bool  # whether it was the replay of a captured one
    logits: torch.Tensor | None  # [N, vocab_size]; None: no sequence draws a token
    prompt_logprobs: ops.LogProbabilities | None  # of the batch's prompt positions; None: nobody asked


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What a step drew, on its way from the device to the host."""

    batch: Batch
    token_ids: torch.Tensor  # [N] on the host, as all tensors here; not to be read before `arrived`
    logprobs: ops.LogProbabilities | None  # of the rows that asked
    prompt_logprobs: ops.LogProbabilities | None
    arrived: torch.cuda.Event | None  # None: it was drawn on the host
    graph: bool

    def result(self) -> StepResult:
        """Waits until the device has drawn the tokens."""
        if self.arrived is not None:
            self.arrived.synchronize()
        logprobs = None if self.logprobs is None else self._logprobs(self.logprobs)
        return StepResult(self.token_ids.tolist(), logprobs, self._prompt_logprobs(), self.graph)

    def _logprobs(self, told: ops.LogProbabilities) -> list[TokenLogprobs | None]:
        """For each of the N rows."""
        counts = self.batch.num_logprobs
        asking = counts >= 0
        answers = iter(token_logprobs(told, self.token_ids.numpy()[asking].tolist(), counts[asking].tolist()))
        return [next(answers) if asked else None for asked in asking]

    def _prompt_logprobs(self) -> list[TokenLogprobs]:
        if self.prompt_logprobs is None:
            return []
        targets, counts = self.batch.prompt_targets, self.batch.prompt_num_logprobs
        return token_logprobs(self.prompt_logprobs, targets.tolist(), counts.tolist())


class ModelRunner:
    """`forward` and `sample` compute one batch over a KV cache of `num_blocks` blocks.

    Beside the keys and values of every stored token lies its id (`token_cache`), so that what a sequence has seen can be
    looked up on the device, through its block table, whoever computed the blocks.
    """

    def __init__(
        self,
        shape: ModelShape,
        model: Decoder,
        parallel: TensorParallel,
        engine: EngineConfig,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        channel: BatchChannel | None = None,
    ) -> None:
        self.shape = shape
        self.model = model
        self.parallel = parallel
        self.overlap = engine.overlap
        self.max_model_len = max_model_len
        self.device = device
        self.num_blocks = num_blocks
        self.can_retry = parallel.size == 1  # other ranks would already compute what ran out of memory here
        self.channel = channel  # to the other ranks' hosts; None: there are none, or nothing is shared yet
        self.check = RankCheck(parallel) if engine.check_ranks and parallel.size > 1 else None
        self.phases: dict[str, float] = {}  # seconds that each part of the construction took
        num_kv_heads = shape.local_sizes(parallel.size).num_kv_heads
        self.kv_cache = zeros((2, shape.num_layers, num_blocks, num_kv_heads, engine.block_size, shape.head_dim), dtype, device)
        keys, values = self.kv_cache.transpose(3, 4)
        self.kv_caches = list(zip(keys, values, strict=True))
        self.token_cache = zeros((num_blocks * engine.block_size + 1,), torch.int32, device)  # the last place is slot -1's
        self.packer: InputPacker | None = None  # None: attention is not the kernels', or there is no GPU
        self.graphs: CudaGraphs | None = None
        self.windows = tuple(dict.fromkeys(shape.window_of(layer) for layer in range(shape.num_layers)))
        if ops.attention_takes(self.kv_caches[0][0], shape.num_heads // shape.num_kv_heads):
            self.packer = InputPacker(self.windows, self._attention_shape(engine), max_model_len)
        self.last_tokens = torch.zeros(engine.max_num_seqs, dtype=torch.int32, device=device)  # by sample slot

    def _attention_shape(self, engine: EngineConfig) -> ops.AttentionShape:
        local = self.shape.local_sizes(self.parallel.size)
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return ops.AttentionShape(engine.block_size, local.num_heads, local.num_kv_heads, multiprocessors)

    @torch.inference_mode()
    def capture_graphs(self, engine: EngineConfig) -> None:
        """Capture steps of few tokens, where kernels that can be captured compute them."""
        if not engine.cuda_graphs or self.packer is None:
            return
        graphs = CudaGraphs(self._compute_packed, self.packer, self.device)
        max_blocks = -(-self.max_model_len // engine.block_size)
        graphs.capture(graph_sizes(engine.max_num_seqs, engine.max_num_batched_tokens), engine.max_num_seqs * max_blocks)
        self.graphs = graphs

    def share(self, batch: Batch) -> None:
        """Rank 0: hand the batch to the other ranks, which are waiting in `receive`."""
        if self.channel is not None:
            self.channel.send(batch)

    def receive(self) -> Batch | None:
        """Other ranks: wait for rank 0's next batch; None when it has closed."""
        assert self.channel is not None, "rank 0 has nobody to receive from"
        batch = self.channel.receive()
        if batch is None:
            self._release_graphs()
        return batch

    def close(self) -> None:
        if self.channel is not None:
            self.channel.send_stop()
        self._release_graphs()

    def _release_graphs(self) -> None:
        """NCCL does not end while graphs live that hold its sums."""
        self.graphs = None

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Forward:
        """Launch the forward pass: writes the keys and values of the batch's tokens into the cache. Every rank."""
        step = batch.to_tensors(self.device)
        hidden, graph = self._hidden(batch, step)
        if self.check is not None:
            self.check.forward(batch, hidden)
        logits = None
        if batch.num_samples:  # every rank: they gather the vocabulary
            rows = hidden if batch.num_samples == batch.num_tokens else hidden.index_select(0, step.sample_rows)
            logits = self.model.logits(rows)
        return Forward(step, graph, logits, self._prompt_logprobs(batch, step, hidden))

    def _hidden(self, batch: Batch, step: BatchArrays[torch.Tensor]) -> tuple[torch.Tensor, bool]:
        """Hidden states [T, hidden_size] of the batch's tokens, and whether a graph gave them."""
        if self.packer is None:
            return self._compute(ModelInputs(step.token_ids, step.positions, self._plain_attention(batch, step))), False
        size = self.graphs.size_for(batch.num_tokens) if self.graphs else None
        if self.graphs is not None and size is not None:
            with contextlib.suppress(ops.PlanTooLarge):
                return self.graphs.replay(self.packer.pack(batch, size), batch.num_tokens), True
        packed = self.packer.pack(batch)
        return self._compute_packed(packed, to_device(packed.buffer, self.device)), False

    def _plain_attention(self, batch: Batch, step: BatchArrays[torch.Tensor]) -> AttentionInputs:
        keys, _ = self.kv_caches[0]
        heads = self.shape.local_sizes(self.parallel.size).num_heads
        sequences = batch.cu_seqlens_q, batch.context_lens
        plans = {window: ops.group_pieces(*sequences, step.block_tables, keys, heads, window) for window in self.windows}
        return AttentionInputs(step.slot_mapping, step.block_tables, plans)

    def _compute_packed(self, packed: PackedInputs, flat: torch.Tensor) -> torch.Tensor:
        local = self.shape.local_sizes(self.parallel.size)
        return self._compute(packed.over(flat, local.num_heads, self.shape.head_dim))

    def _compute(self, inputs: ModelInputs) -> torch.Tensor:
        """Launch the model, kernel by kernel."""
        token_ids = ops.feed_tokens(inputs.token_ids, self.last_tokens, inputs.attention.slot_mapping, self.token_cache)
        hidden: torch.Tensor = self.model(token_ids, inputs.positions, inputs.attention, self.kv_caches)
        return hidden

    def _prompt_logprobs(
        self, batch: Batch, step: BatchArrays[torch.Tensor], hidden: torch.Tensor
    ) -> ops.LogProbabilities | None:
        if len(batch.prompt_rows) == 0:
            return None
        k = int(batch.prompt_num_logprobs.max())
        return prompt_log_probabilities(
            self.model.logits, hidden, step.prompt_rows, step.prompt_targets, k, self.shape.vocab_size
        )

    @torch.inference_mode()
    def sample(self, batch: Batch, forward: Forward, mask: TokenMask | None = None) -> Drawn:
        """Rank 0: launch the drawing of tokens, which stay on the device for the next step and go to the host beside it.

        `mask`: what grammars allow.
        """
        answer, logprobs = torch.empty(0, dtype=torch.int32), None
        if forward.logits is not None:
            token_cache = self.token_cache[:-1].view(self.num_blocks, -1)
            sampled = sample_tokens(forward.logits, batch, forward.step, token_cache, mask)
            token_ids, logprobs = sampled.token_ids.int(), sampled.logprobs
            self._keep(token_ids, forward.step)
            answer = token_ids.masked_fill(sampled.broken, NO_TOKEN)
        on_host = answer.to("cpu", non_blocking=True)
        told, prompt_told = _to_host(logprobs), _to_host(forward.prompt_logprobs)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return Drawn(batch, on_host, told, prompt_told, arrived, forward.graph)

    @torch.inference_mode()
    def follow(self, batch: Batch) -> None:
        """Other ranks: compute what rank 0 computes, and take over what it draws."""
        step = self.forward(batch).step
        if batch.num_samples:
            self._keep(torch.empty(batch.num_samples, dtype=torch.int32, device=self.device), step)

    def execute(self, batch: Batch) -> StepResult:
        """The whole step at once, on rank 0."""
        return self.sample(batch, self.forward(batch)).result()

    def _keep(self, token_ids: torch.Tensor, step: BatchArrays[torch.Tensor]) -> None:
        """Store rank 0's drawn tokens [N] where the next step looks for them, on every rank: no host takes part."""
        if self.overlap:
            self.parallel.broadcast(token_ids)
            if self.check is not None:
                self.check.tokens(token_ids)
            self.last_tokens[step.sample_slots] = token_ids


def _to_host(told: ops.LogProbabilities | None) -> ops.LogProbabilities | None:
    """Copies that are under way; nobody waits for them here."""
    return None if told is None else ops.LogProbabilities(*(tensor.to("cpu", non_blocking=True) for tensor in told))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.zeros`, but memory of a CPU is resident only where it was written: a short run never fills its cache."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def build_runner(config: Config, shape: ModelShape, parallel: TensorParallel, device: torch.device) -> ModelRunner:
    """Load the weights, measure what memory is left, and make the KV cache of it. Every rank calls this together.

    ConfigError: the memory that is left holds less than one sequence of `max_model_len` tokens.
    """
    max_model_len = max_model_len_of(config.model, shape)
    dtype_name = resolve_dtype(config.model.dtype, shape, device.type == "cuda")
    dtype = getattr(torch, dtype_name)
    ops.choose_backend(config.engine.attention_backend, device)
    begin = time.monotonic()
    max_rows = config.engine.max_num_batched_tokens
    parallel = connect(parallel, max_rows, shape.hidden_size, dtype, device, config.engine.peer_memory)
    weights = f"{gib(shape.weight_bytes(dtype_name, parallel.size))} of weights"
    with require_fit(weights, device, "raise hw.tensor_parallel, or take a smaller model"):
        model = Decoder(shape, parallel, dtype, device, max_model_len)
        report = load_weights(model, shape, config.model, config.seed, device)
    model.eval()
    logger.info("loaded %s; %s", report.explain(), memory_in_words(device))
    loaded = time.monotonic()
    profiler = ModelRunner(shape, model, parallel, config.engine, max_model_len, dtype, device, num_blocks=1)
    num_blocks = measure_kv_blocks(profiler, config, shape, dtype_name)
    del profiler
    channel = open_channel(parallel.host_group) if parallel.host_group is not None else None
    runner = ModelRunner(shape, model, parallel, config.engine, max_model_len, dtype, device, num_blocks, channel)
    logger.info(
        "KV cache: %s blocks of %d tokens, %s; %s",
        f"{num_blocks:,}",
        config.engine.block_size,
        gib(runner.kv_cache.nbytes),
        memory_in_words(device),
    )
    measured = time.monotonic()
    with require_fit("captured graphs", device, "lower engine.gpu_memory_utilization, or set engine.cuda_graphs=false"):
        runner.capture_graphs(config.engine)
    if device.type == "cuda" and config.engine.attention_backend == "auto" and runner.packer is None:
        logger.warning(
            "attention is left to plain PyTorch, which is slow: kernels take model.dtype float16 or bfloat16, heads of 64 or "
            "128, at most 16 query heads to a KV head, and an engine.block_size that is a multiple of 16"
        )
    runner.phases = {"load": loaded - begin, "kv": measured - loaded, "graphs": time.monotonic() - measured}
    return runner
