// Rotary embedding with the KV-cache write: `ops.rope_and_cache`.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

// Strides count elements; the last dimension of every tensor is dense.
struct Rope {
  void* out;  // q turned [T, H, D], dense
  const void *q, *k, *v;
  void *k_cache, *v_cache;
  const float* cos_sin;             // [P, D]: cosines, then sines
  const int *positions, *slots;     // [T]
  int64_t q_strides[2], k_strides[2], v_strides[2];    // of tokens and of heads
  int64_t k_cache_strides[3], v_cache_strides[3];      // of blocks, of places in a block, and of heads
  int64_t num_tokens;
  int num_heads, num_kv_heads, head_dim, block_size;
  bool aligned;  // half a head begins on 16 bytes everywhere
};

void rope_and_cache(const Rope& rope, Dtype dtype, cudaStream_t stream);

}  // namespace batchinfer
