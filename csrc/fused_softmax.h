// Scale, causal mask and softmax in one pass over the scores: `engine.attention_backend=fused_softmax`.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

// Rows of `length` scores [batch, heads, queries, length], dense, and probabilities alike (they may be the same memory if they
// have one element type). Row (b, h, q) sees columns end - window (window 0: 0) to end - 1 for end = ends[b, q], or
// length - queries + q + 1 where ends is null; all other columns become 0, and their scores are not looked at.
struct Softmax {
  void* probs;
  const void* scores;
  const int* ends;
  float scale;
  int64_t rows;
  int heads, queries, length, window;
};

// scores are of `from`; probs of `from`, or of a half type where `from` is float32.
void fused_softmax(const Softmax& softmax, Dtype from, Dtype to, cudaStream_t stream);

// The slow twin that benchmarks compare with: a thread a row, three passes, neighbours in a warp `length` elements apart.
void fused_softmax_naive(const Softmax& softmax, Dtype from, Dtype to, cudaStream_t stream);

}  // namespace batchinfer
