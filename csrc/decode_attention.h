// Attention of sequences with one query token over the paged KV cache, and the merging of partial results: two thirds of
// `ops.paged_attention`. The work of each launch is laid out on the host, by batchinfer/ops/attention_plan.py.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

// Caches are [blocks, K, block_size, D] in memory: the tokens of one block and one KV head lie together. Strides in elements.
struct DecodeAttention {
  const void* q;  // [T, H, D], rows q_stride apart
  int64_t q_stride;
  const void *k_cache, *v_cache;
  int64_t k_block_stride, k_head_stride, v_block_stride, v_head_stride;
  const int* block_tables;  // [S, ...], rows table_stride apart
  int64_t table_stride;
  const int* segments;     // [.., 8]: token row, sequence, kv_begin, kv_end, slot or -1
  const int* part_indptr;  // [num_parts + 1]: the segments of each part
  void* out;               // [T, H, D]
  float* partial_out;      // [slots, H, D]
  float* partial_lse;      // [slots, H]
  int num_parts, num_heads, num_kv_heads, block_size;
  int num_segments, num_tables, table_width, num_blocks;  // sizes of what is read ahead
  float scale;
  bool look_ahead;  // set at launch
};

// head_dim: 64 or 128; H / K: 1..16; block_size: a multiple of 16; element type float16 or bfloat16. warps: how many work on one
// part of one KV head (at most 16; fewer where a group of many query heads takes more registers).
void decode_attention(const DecodeAttention& a, int head_dim, int warps, Dtype dtype, cudaStream_t stream);

struct CombineAttention {
  void* out;  // [T, H, D]
  const float *partial_out, *partial_lse;
  const int* rows;    // [num_rows]: token rows of `out`; -1: padding
  const int* indptr;  // [num_rows + 1]: the slots of each
  const int* slots;
  int num_rows, num_heads;
};

void combine_attention(const CombineAttention& a, int head_dim, Dtype dtype, cudaStream_t stream);

}  // namespace batchinfer
