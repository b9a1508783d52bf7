"""transformers as the oracle in float64, and our model driven by hand over a paged cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchinfer import ops
from batchinfer.config import ModelConfig
from batchinfer.model.config import ModelShape, load_shape
from batchinfer.model.decoder import Decoder
from batchinfer.model.layers import AttentionInputs
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
    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies, factor = frequencies_of(config, length=int(position_ids.max()) + 1)
        angles = position_ids.double()[..., None] * torch.tensor(frequencies, dtype=torch.float64)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * factor, angles.sin() * factor

    return forward


def frequencies_of(config: Any, length: int) -> tuple[list[float], float]:
    """Of a step over sequences up to `length`, one pair of elements at a time; and what cosines are multiplied with."""
    rope, dim = config.rope_parameters, getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor", 1.0)
    if kind == "dynamic" and length > (trained := config.max_position_embeddings):
        theta *= (factor * length / trained - factor + 1) ** (dim / (dim - 2))
    plain = [theta ** (-i / dim) for i in range(0, dim, 2)]
    if kind == "linear":
        return [frequency / factor for frequency in plain], 1.0
    if kind == "llama3":
        return [_llama3(frequency, rope) for frequency in plain], 1.0
    if kind == "yarn":
        return [_yarn(i, frequency, dim, rope) for i, frequency in enumerate(plain)], _temperature(rope)
    return plain, 1.0


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    """By wavelength, as the Llama 3.1 release describes it."""
    wavelength = 2 * math.pi / frequency
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    if wavelength > context / low:
        return frequency / rope["factor"]
    if wavelength < context / high:
        return frequency
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / rope["factor"] + smooth * frequency


def _yarn(pair: int, frequency: float, dim: int, rope: dict[str, Any]) -> float:
    """By index: the pairs that turn beta_fast and beta_slow times in the original context bound the ramp."""
    context = rope["original_max_position_embeddings"]
    bounds = [
        dim / 2 * math.log(context / (2 * math.pi * turns)) / math.log(rope["rope_theta"])
        for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
    ]
    if rope.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    begin, end = max(bounds[0], 0), min(bounds[1], dim - 1)
    stretched = min(1.0, max(0.0, (pair - begin) / (end - begin)))
    return stretched * frequency / rope["factor"] + (1 - stretched) * frequency


def _temperature(rope: dict[str, Any]) -> float:
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    if "mscale" in rope:
        growth = math.log(rope["factor"]) / 10
        return float((rope["mscale"] * growth + 1) / (rope["mscale_all_dim"] * growth + 1))
    return 0.1 * math.log(rope["factor"]) + 1


def load(folder: Path, parallel: TensorParallel | None = None, dtype: torch.dtype = torch.float64) -> Paged:
    config = ModelConfig(path=str(folder))
    shape = load_shape(config)
    model = Decoder(shape, parallel or TensorParallel(), dtype, CPU, max_model_len=256)
    load_weights(model, shape, config, 0, CPU)
    return Paged(model, shape, parallel or TensorParallel(), dtype)


class Paged:
    """Our model with a cache of scattered blocks. `step` extends any sequences by any numbers of tokens."""

    def __init__(
        self, model: Decoder, shape: ModelShape, parallel: TensorParallel, dtype: torch.dtype, block_size: int = 5
    ) -> None:
        self.model, self.shape, self.block_size, self.max_blocks = model, shape, block_size, 24
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
        attention = self._attention(*(torch.tensor(x, dtype=torch.int32) for x in (slots, tables, begins, contexts)))
        with torch.inference_mode():
            hidden = self.model(torch.tensor(tokens), torch.tensor(positions), attention, self.caches)
            logits = self.model.logits(hidden)
        return [logits[begin:end] for begin, end in itertools.pairwise(begins[: len(chunks) + 1])]

    def _attention(self, slots: Tensor, tables: Tensor, begins: Tensor, contexts: Tensor) -> AttentionInputs:
        shape, keys = self.shape, self.caches[0][0]
        heads = keys.shape[2] * shape.num_heads // shape.num_kv_heads
        windows = {shape.window_of(layer) for layer in range(shape.num_layers)}
        plans = {window: ops.group_pieces(begins, contexts, tables, keys, heads, window) for window in windows}
        return AttentionInputs(slots, tables, plans)


def greedy(paged: Paged, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Continue all prompts together."""
    logits = paged.step(dict(enumerate(prompts)))
    drawn = [[int(rows[-1].argmax())] for rows in logits]
    for _ in range(num_tokens - 1):
        for tokens, rows in zip(drawn, paged.step({i: t[-1:] for i, t in enumerate(drawn)}), strict=True):
            tokens.append(int(rows[-1].argmax()))
    return drawn
