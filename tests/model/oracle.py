"""transformers as the oracle in float64, and our model driven by hand over a paged cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchinfer.config import ModelConfig
from batchinfer.model.config import ModelShape, load_shape
from batchinfer.model.layers import AttentionInputs
from batchinfer.model.llama import LlamaForCausalLM
from batchinfer.model.loader import load_weights
from batchinfer.model.parallel import TensorParallel

CPU = torch.device("cpu")


def widen(model: Any) -> Any:
    """transformers computes norms and rotary angles in float32 whatever the model's type: do these two in float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = _rotary(model.config)
    return model


def _norm(module: Any) -> Any:
    return lambda x: module.weight * (x / (x * x).mean(-1, keepdim=True).add(module.variance_epsilon).sqrt())


def _rotary(config: Any) -> Any:
    frequencies = torch.tensor(frequencies_of(config.head_dim, config.rope_parameters), dtype=torch.float64)

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.double()[..., None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    return forward


def frequencies_of(head_dim: int, rope: dict[str, Any]) -> list[float]:
    """One frequency at a time, by wavelength, as the Llama 3.1 release describes it."""
    result = []
    for i in range(0, head_dim, 2):
        frequency = 1 / rope["rope_theta"] ** (i / head_dim)
        if rope["rope_type"] == "llama3":
            wavelength = 2 * math.pi / frequency
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            context = rope["original_max_position_embeddings"]
            if wavelength > context / low:
                frequency /= rope["factor"]
            elif wavelength >= context / high:
                smooth = (context / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        result.append(frequency)
    return result


def load(folder: Path, parallel: TensorParallel | None = None, dtype: torch.dtype = torch.float64) -> Paged:
    config = ModelConfig(path=str(folder))
    shape = load_shape(config)
    model = LlamaForCausalLM(shape, parallel or TensorParallel(), dtype, CPU, max_model_len=256)
    load_weights(model, shape, config, 0, CPU)
    return Paged(model, shape, parallel or TensorParallel(), dtype)


class Paged:
    """Our model with a cache of scattered blocks. `step` extends any sequences by any numbers of tokens."""

    def __init__(
        self, model: LlamaForCausalLM, shape: ModelShape, parallel: TensorParallel, dtype: torch.dtype, block_size: int = 5
    ) -> None:
        self.model, self.block_size, self.max_blocks = model, block_size, 24
        size = (64, block_size, shape.local_sizes(parallel.size).num_kv_heads, shape.head_dim)
        self.caches = [(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)) for _ in range(shape.num_layers)]
        self.free = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, chunks: dict[int, Sequence[int]], padding: int = 0) -> list[Tensor]:
        """{sequence: its next tokens} -> the logits after each of those tokens, for each sequence."""
        tokens, positions, slots, tables, begins, contexts = [], [], [], [], [0], []
        for sequence, chunk in chunks.items():
            table, start = self.tables.setdefault(sequence, []), self.lengths.get(sequence, 0)
            self.lengths[sequence] = start + len(chunk)
            while len(table) * self.block_size < start + len(chunk):
                table.append(self.free.pop())
            for position in range(start, start + len(chunk)):
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
                positions.append(position)
            tokens += list(chunk)
            tables.append(table + [0] * (self.max_blocks - len(table)))
            begins.append(len(tokens))
            contexts.append(start + len(chunk))
        for _ in range(padding):
            tokens.append(0), positions.append(0), slots.append(-1), tables.append([0] * self.max_blocks)
            begins.append(len(tokens)), contexts.append(0)
        attention = AttentionInputs(*(torch.tensor(x, dtype=torch.int32) for x in (slots, tables, begins, contexts)))
        with torch.inference_mode():
            hidden = self.model(torch.tensor(tokens), torch.tensor(positions), attention, self.caches)
            logits = self.model.logits(hidden)
        return [logits[begin:end] for begin, end in zip(begins, begins[1 : len(chunks) + 1], strict=False)]


def greedy(paged: Paged, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Continue all prompts together."""
    logits = paged.step(dict(enumerate(prompts)))
    drawn = [[int(rows[-1].argmax())] for rows in logits]
    for _ in range(num_tokens - 1):
        for tokens, rows in zip(drawn, paged.step({i: t[-1:] for i, t in enumerate(drawn)}), strict=True):
            tokens.append(int(rows[-1].argmax()))
    return drawn
