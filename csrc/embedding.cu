// Rows of the embedding, and the tokens that are looked up. Bound by memory: rows are copied, whatever their element type is.
#include "embedding.h"

#include "common/device.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kThreads = 128;
constexpr int kFewTokens = 64;  // so few blocks leave multiprocessors idle: rows are spread wider

// Rows of `size` units; a thread copies kUnits of them, kThreads apart.
template <typename Unit, int kUnits>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(Unit* out, const Unit* weight, const int* token_ids, int size, int64_t stride, int start, int stop) {
  const int64_t token = blockIdx.x;
  const int first = blockIdx.y * kUnits * kThreads + threadIdx.x;
  wait_for_previous();
  let_next_start();
  const int token_id = token_ids[token];
  const bool is_here = token_id >= start && token_id < stop;
  const Unit* from = weight + (is_here ? token_id - start : 0) * stride;
  Unit units[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) units[i] = is_here && first + i * kThreads < size ? from[first + i * kThreads] : Unit{};
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (first + i * kThreads < size) out[token * size + first + i * kThreads] = units[i];
}

template <typename Unit, int kUnits>
void launch_embedding(void* out, const void* weight, const int* token_ids, int64_t tokens, int64_t row_bytes, int64_t stride,
                      int start, int stop, cudaStream_t stream) {
  const int size = row_bytes / sizeof(Unit);
  const unsigned blocks = (size + kUnits * kThreads - 1) / (kUnits * kThreads);
  launch("embedding", embedding_kernel<Unit, kUnits>, dim3(tokens, blocks), dim3(kThreads), 0, stream, static_cast<Unit*>(out),
         static_cast<const Unit*>(weight), token_ids, size, stride / static_cast<int64_t>(sizeof(Unit)), start, stop);
}

__global__ void __launch_bounds__(kThreads) feed_tokens_kernel(int* out, const int* token_ids, const int* last_tokens,
                                                               const int* slots, int* token_cache, int64_t tokens) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  wait_for_previous();
  let_next_start();
  if (i >= tokens) return;
  int token_id = token_ids[i];
  const int slot = slots[i];
  if (token_id < 0) token_id = last_tokens[-1 - token_id];
  out[i] = token_id;
  if (slot >= 0) token_cache[slot] = token_id;
}

}  // namespace

void embedding(void* out, const void* weight, const int* token_ids, int64_t tokens, int64_t row_bytes, int64_t weight_stride,
               int start, int stop, bool aligned, cudaStream_t stream) {
  const auto launcher = !aligned               ? launch_embedding<uint16_t, 8>
                        : tokens <= kFewTokens ? launch_embedding<int4, 1>
                                               : launch_embedding<int4, 4>;
  launcher(out, weight, token_ids, tokens, row_bytes, weight_stride, start, stop, stream);
}

void feed_tokens(int* out, const int* token_ids, const int* last_tokens, const int* slots, int* token_cache, int64_t tokens,
                 cudaStream_t stream) {
  launch("feed_tokens", feed_tokens_kernel, dim3((tokens + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, out, token_ids,
         last_tokens, slots, token_cache, tokens);
}

}  // namespace batchinfer
