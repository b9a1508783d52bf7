// Rows of the embedding, and the tokens that are looked up: `ops.embedding`, `ops.feed_tokens`.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace batchinfer {

// out [tokens, row_bytes] = the rows of weight by token_ids - start, zeros for ids outside [start, stop). weight_stride: bytes.
// aligned: rows begin and end on 16 bytes; else they are whole words of 2 bytes.
void embedding(void* out, const void* weight, const int* token_ids, int64_t tokens, int64_t row_bytes, int64_t weight_stride,
               int start, int stop, bool aligned, cudaStream_t stream);

// out[i] = token_ids[i], or last_tokens[-1 - token_ids[i]] where that is negative; stored at token_cache[slots[i]] too if
// slots[i] >= 0. out may be token_ids.
void feed_tokens(int* out, const int* token_ids, const int* last_tokens, const int* slots, int* token_cache, int64_t tokens,
                 cudaStream_t stream);

}  // namespace batchinfer
