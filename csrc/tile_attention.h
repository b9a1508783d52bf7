// Attention of tiles of query rows over the paged cache: `torch.ops.batchinfer.tile_attention`. Prefill chunks, and prefixes
// that decode rows share.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

constexpr int kTileRows = 128;  // the most queries an item may have; attention_plan.py says the same
constexpr int kTileFields = 8;

// An item of `tiles`: query i (0 <= i < q_count) is row tile_rows[q_begin + i] and sees the keys at positions p of `sequence`
// with kv_begin <= p < kv_end, p <= q_position + i and, with a window, p > q_position + i - window. It goes to `out`, or to
// partial slot `slot` + i when slot >= 0. The first item with q_count 0 ends the list.
struct TileItem {
  int q_begin, q_count, sequence, kv_begin, kv_end, q_position, slot, unused;
};
static_assert(sizeof(TileItem) == kTileFields * sizeof(int));

struct TileAttention {
  const void* q;        // [T, num_heads, head_dim], rows q_stride elements apart
  const void* k_cache;  // [num_blocks, num_kv_heads, block_size, head_dim]: block_stride and head_stride elements
  const void* v_cache;
  const int* block_tables;  // [sequences, table_stride]
  const TileItem* tiles;      // [num_tiles]
  const int* tile_rows;
  void* out;           // [T, num_heads, head_dim]
  float* partial_out;  // [slots, num_heads, head_dim]
  float* partial_lse;  // [slots, num_heads]: log2 of the sum of powers
  int64_t q_stride, block_stride, head_stride;
  int num_tiles, num_blocks, table_stride, num_heads, num_kv_heads, head_dim, block_size;
  int window;          // 0: none
  float scale_log2;    // the scale of scores times log2(e), > 0
  Dtype dtype;         // float16 or bfloat16
};

void tile_attention(const TileAttention& call, cudaStream_t stream);

// The two ways it is computed. Tensor cores of every architecture through mma.sync; Hopper's through wgmma.
void tile_attention_mma(const TileAttention& call, cudaStream_t stream);
bool tile_attention_wgmma_takes(const TileAttention& call);
void tile_attention_wgmma(const TileAttention& call, cudaStream_t stream);

}  // namespace batchinfer
