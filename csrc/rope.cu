// Rotary embedding with the KV-cache write. Bound by memory: queries, keys and values are read once and written once. The cosines
// and sines of a token are read by each of its heads, from the multiprocessor's cache: threads with several heads each would read
// them less often, but their few large blocks fill the last wave worse. Products and sums are rounded one by one, never fused, as
// the reference's are: the results are equal to the last bit.
#include "rope.h"

#include "common/device.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kThreads = 256;

// Heads are numbered through: queries, then keys, then values.
template <typename T>
__device__ __forceinline__ const T* head_of(const Rope& rope, int64_t token, int head) {
  if (head < rope.num_heads) return static_cast<const T*>(rope.q) + token * rope.q_strides[0] + head * rope.q_strides[1];
  head -= rope.num_heads;
  if (head < rope.num_kv_heads) return static_cast<const T*>(rope.k) + token * rope.k_strides[0] + head * rope.k_strides[1];
  head -= rope.num_kv_heads;
  return static_cast<const T*>(rope.v) + token * rope.v_strides[0] + head * rope.v_strides[1];
}

// Where the head goes; null: nowhere, since the token is not stored.
template <typename T>
__device__ __forceinline__ T* place_of(const Rope& rope, int64_t token, int head, int slot) {
  if (head < rope.num_heads) return static_cast<T*>(rope.out) + (token * rope.num_heads + head) * rope.head_dim;
  if (slot < 0) return nullptr;
  head -= rope.num_heads;
  const bool is_key = head < rope.num_kv_heads;
  if (!is_key) head -= rope.num_kv_heads;
  const int block = slot / rope.block_size, place = slot - block * rope.block_size;
  T* cache = static_cast<T*>(is_key ? rope.k_cache : rope.v_cache);
  return cache + block * (is_key ? rope.k_cache_strides[0] : rope.v_cache_strides[0]) +
         place * (is_key ? rope.k_cache_strides[1] : rope.v_cache_strides[1]) +
         head * (is_key ? rope.k_cache_strides[2] : rope.v_cache_strides[2]);
}

__device__ __forceinline__ void turn(float& first, float& second, float cosine, float sine) {
  const float x = first, y = second;
  first = __fsub_rn(__fmul_rn(x, cosine), __fmul_rn(y, sine));
  second = __fadd_rn(__fmul_rn(y, cosine), __fmul_rn(x, sine));
}

template <typename T>
__device__ __forceinline__ void turn(Vector<T>& first, Vector<T>& second, const float* cosines, const float* sines) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    float x = to_float(first.values[i]), y = to_float(second.values[i]);
    turn(x, y, cosines[i], sines[i]);
    first.values[i] = from_float<T>(x), second.values[i] = from_float<T>(y);
  }
}

// A token takes the blocks along y, `heads_at_once` heads each; `lanes` threads a head, with 16 bytes of each half.
template <typename T>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ Rope rope, int lanes, int heads_at_once) {
  using V = Vector<T>;
  const int half = rope.head_dim / 2, turned = rope.num_heads + rope.num_kv_heads, total = turned + rope.num_kv_heads;
  const int64_t token = blockIdx.x;
  const int group = threadIdx.x / lanes, column = (threadIdx.x - group * lanes) * V::kSize;
  const int head = blockIdx.y * heads_at_once + group;
  wait_for_previous();
  let_next_start();
  if (group >= heads_at_once || head >= total) return;
  // All loads before the first use of any, so that few tokens wait for two of them in turn, not for four.
  const T* from = head_of<T>(rope, token, head) + column;
  V first = V::load(from), second = V::load(from + half);
  const int slot = rope.slots[token], position = rope.positions[token];
  if (head < turned) {
    const float* angles = rope.cos_sin + int64_t(position) * rope.head_dim + column;
    alignas(16) float cosines[V::kSize], sines[V::kSize];
#pragma unroll
    for (int i = 0; i < V::kSize; i += 4) {
      *reinterpret_cast<float4*>(cosines + i) = *reinterpret_cast<const float4*>(angles + i);
      *reinterpret_cast<float4*>(sines + i) = *reinterpret_cast<const float4*>(angles + half + i);
    }
    turn(first, second, cosines, sines);
  }
  T* to = place_of<T>(rope, token, head, slot);
  if (to == nullptr) return;
  first.store(to + column), second.store(to + column + half);
}

// Any even head size at any alignment, an element of each half at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads) rope_by_element_kernel(const __grid_constant__ Rope rope) {
  const int half = rope.head_dim / 2, turned = rope.num_heads + rope.num_kv_heads, total = turned + rope.num_kv_heads;
  const int64_t token = blockIdx.x;
  wait_for_previous();
  let_next_start();
  const int slot = rope.slots[token];
  const float* angles = rope.cos_sin + int64_t(rope.positions[token]) * rope.head_dim;
  for (int i = threadIdx.x; i < total * half; i += kThreads) {
    const int head = i / half, column = i - head * half;
    const T* from = head_of<T>(rope, token, head) + column;
    T* to = place_of<T>(rope, token, head, slot);
    if (to == nullptr) continue;
    float x = to_float(from[0]), y = to_float(from[half]);
    if (head < turned) turn(x, y, angles[column], angles[half + column]);
    to[column] = from_float<T>(x), to[column + half] = from_float<T>(y);
  }
}

template <typename T>
void launch_rope(const Rope& rope, int lanes, cudaStream_t stream) {
  const int heads = rope.num_heads + 2 * rope.num_kv_heads, most = kThreads / lanes;
  const int blocks = (heads + most - 1) / most, heads_at_once = (heads + blocks - 1) / blocks;
  const unsigned threads = (heads_at_once * lanes + kWarp - 1) / kWarp * kWarp;
  launch("rope_and_cache", rope_kernel<T>, dim3(rope.num_tokens, blocks), dim3(threads), 0, stream, rope, lanes, heads_at_once);
}

}  // namespace

void rope_and_cache(const Rope& rope, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int lanes = rope.head_dim / 2 / Vector<T>::kSize;
    if (!rope.aligned || lanes > kThreads)
      return launch("rope_and_cache", rope_by_element_kernel<T>, dim3(rope.num_tokens), dim3(kThreads), 0, stream, rope);
    launch_rope<T>(rope, lanes, stream);
  });
}

}  // namespace batchinfer
