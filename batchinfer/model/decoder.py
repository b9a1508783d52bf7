"""The decoder: layers of pre-normed attention and a gated MLP, split over tensor-parallel ranks.

Works on a flat batch of T tokens of many sequences; what belongs to which sequence is said by `AttentionInputs`. Llama,
Mistral and Qwen are one network; their biases, sliding windows, and norms of queries and keys are said by its `ModelShape`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from batchinfer import ops
from batchinfer.model.config import ModelShape
from batchinfer.model.layers import (
    AttentionInputs,
    ColumnParallelLinear,
    KVCache,
    OutputPart,
    RMSNorm,
    RowParallelLinear,
    VocabParallel,
    WeightSlice,
)
from batchinfer.model.parallel import TensorParallel
from batchinfer.model.rope import rotary_table


class Decoder(nn.Module):
    """One rank's part of the model, with zero weights until `loader.load_weights` fills them.

    `max_model_len`: positions 0 to max_model_len - 1 are in the rotary table. ConfigError: sizes that do not divide over
    the ranks.
    """

    cos_sin: Tensor

    def __init__(
        self, shape: ModelShape, parallel: TensorParallel, dtype: torch.dtype, device: torch.device, max_model_len: int
    ) -> None:
        super().__init__()
        self.parallel = parallel
        shape.local_sizes(parallel.size)
        self.embed_tokens = VocabParallel("model.embed_tokens.weight", shape, parallel, dtype, device)
        self.layers = nn.ModuleList(DecoderLayer(i, shape, parallel, dtype, device) for i in range(shape.num_layers))
        self.norm = RMSNorm("model.norm.weight", shape.hidden_size, shape.rms_norm_eps, dtype, device)
        tied = shape.tie_word_embeddings
        self.lm_head = self.embed_tokens if tied else VocabParallel("lm_head.weight", shape, parallel, dtype, device)
        self.register_buffer("cos_sin", rotary_table(shape, max_model_len, dtype, device), persistent=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionInputs, kv_caches: Sequence[KVCache]) -> Tensor:
        """token_ids and positions [T] -> hidden states [T, hidden_size]. Writes the tokens' keys and values to the caches."""
        x: Tensor = self.embed_tokens.embed(token_ids)
        residual: Tensor | None = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, self.cos_sin, positions, attention, kv_cache)
        normed, _ = self.norm(x, residual) if self.parallel.size == 1 else self.norm.of_sum(x, residual, self.parallel)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, hidden_size] -> logits [S, vocab_size], full on every rank, in the model's dtype."""
        return self.lm_head.logits(hidden)

    def slices(self) -> Iterator[WeightSlice]:
        """Every slice of the checkpoint that this rank wants."""
        yield from self.embed_tokens.slices()
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield from layer.slices()
        yield from self.norm.slices()
        if self.lm_head is not self.embed_tokens:
            yield from self.lm_head.slices()


class DecoderLayer(nn.Module):
    def __init__(self, index: int, shape: ModelShape, parallel: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        size, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm.weight", size, eps, dtype, device)
        self.self_attn = Attention(f"{name}.self_attn", index, shape, parallel, dtype, device)
        self.post_attention_layernorm = RMSNorm(f"{name}.post_attention_layernorm.weight", size, eps, dtype, device)
        self.mlp = GatedMLP(f"{name}.mlp", shape, parallel, dtype, device)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos_sin: Tensor,
        positions: Tensor,
        attention: AttentionInputs,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor]:
        qkv, residual = self.self_attn.qkv_proj(x, residual, self.input_layernorm)
        y = self.self_attn(qkv, cos_sin, positions, attention, kv_cache)
        return self.mlp(y, residual, self.post_attention_layernorm)

    def slices(self) -> Iterator[WeightSlice]:
        for part in (self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp):
            yield from part.slices()


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over the paged cache; a rank computes its own heads."""

    def __init__(
        self, name: str, index: int, shape: ModelShape, parallel: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        local = shape.local_sizes(parallel.size)
        self.head_dim, self.scale, self.sliding_window = shape.head_dim, shape.head_dim**-0.5, shape.window_of(index)
        first_kv_head = parallel.rank * shape.num_kv_heads // parallel.size  # several ranks have the same where they replicate
        parts = [
            self._heads(f"{name}.q_proj", shape.num_heads, parallel.rank * local.num_heads, local.num_heads),
            self._heads(f"{name}.k_proj", shape.num_kv_heads, first_kv_head, local.num_kv_heads),
            self._heads(f"{name}.v_proj", shape.num_kv_heads, first_kv_head, local.num_kv_heads),
        ]
        self.qkv_proj = ColumnParallelLinear(shape.hidden_size, parts, shape.qkv_bias, parallel, dtype, device)
        self.q_norm = self._norm(f"{name}.q_norm.weight", shape, dtype, device)
        self.k_norm = self._norm(f"{name}.k_norm.weight", shape, dtype, device)
        all_heads = shape.num_heads * shape.head_dim
        self.o_proj = RowParallelLinear(f"{name}.o_proj", shape.hidden_size, all_heads, shape.o_bias, parallel, dtype, device)

    def _heads(self, name: str, total: int, first: int, count: int) -> OutputPart:
        return OutputPart(name, total * self.head_dim, first * self.head_dim, (first + count) * self.head_dim)

    def _norm(self, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> RMSNorm | None:
        return RMSNorm(name, shape.head_dim, shape.rms_norm_eps, dtype, device) if shape.qk_norm else None

    def forward(self, qkv: Tensor, cos_sin: Tensor, positions: Tensor, attention: AttentionInputs, kv_cache: KVCache) -> Tensor:
        """What `qkv_proj` gave [T, all heads] -> [T, hidden_size]."""
        parts = qkv.split(self.qkv_proj.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        keys, values = kv_cache
        q = ops.rope_and_cache(q, k, v, cos_sin, positions, keys, values, attention.slot_mapping)
        y = attention.attend(q, kv_cache, self.scale, self.sliding_window)
        projected: Tensor = self.o_proj(y.flatten(1))
        return projected

    def slices(self) -> Iterator[WeightSlice]:
        for part in (self.qkv_proj, self.q_norm, self.k_norm, self.o_proj):
            if part is not None:
                yield from part.slices()


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); a rank computes its own columns of gate and up."""

    def __init__(self, name: str, shape: ModelShape, parallel: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        total = shape.intermediate_size
        start, stop = parallel.bounds(total, shape.local_sizes(parallel.size).intermediate_size)
        parts = [OutputPart(f"{name}.{part}_proj", total, start, stop) for part in ("gate", "up")]
        self.gate_up_proj = ColumnParallelLinear(shape.hidden_size, parts, shape.mlp_bias, parallel, dtype, device)
        size, bias = shape.hidden_size, shape.mlp_bias
        self.down_proj = RowParallelLinear(f"{name}.down_proj", size, total, bias, parallel, dtype, device)

    def forward(self, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The norm in front of the MLP, then the MLP: (x, residual) -> (y, new residual)."""
        gated, residual = self.gate_up_proj.gate(x, residual, norm)
        return self.down_proj(gated), residual

    def slices(self) -> Iterator[WeightSlice]:
        yield from self.gate_up_proj.slices()
        yield from self.down_proj.slices()
