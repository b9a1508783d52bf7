// SiLU-and-multiply. Bound by memory: every input is read once and every output written once, several chunks in flight a thread.
#include "activation.h"

#include "common/chunk.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float silu(float x, float /* of the element type */) { return x / (1.0f + expf(-x)); }
template <typename T>
__device__ __forceinline__ float silu(float x, T) {  // rounded to 16 bits next, so the fast functions cost no accuracy
  return __fdividef(x, 1.0f + __expf(-x));
}

template <typename T, int kChunks, bool kAligned>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(T* out, const T* gate_up, int size, int64_t stride) {
  using V = Vector<T>;
  const int64_t row = blockIdx.x;
  const auto column = [](int i) { return static_cast<int>((blockIdx.y * kChunks + i) * blockDim.x + threadIdx.x) * V::kSize; };
  V gate[kChunks], up[kChunks];
  wait_for_previous();
  let_next_start();
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    gate[i] = load_chunk<T, kAligned>(gate_up + row * stride, column(i), size);
    up[i] = load_chunk<T, kAligned>(gate_up + row * stride + size, column(i), size);
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    V y;
#pragma unroll
    for (int j = 0; j < V::kSize; ++j)
      y.values[j] = from_float<T>(silu(to_float(gate[i].values[j]), T{}) * to_float(up[i].values[j]));
    store_chunk<T, kAligned>(out + row * size, column(i), size, y);
  }
}

template <typename T, int kChunks, bool kAligned>
void launch_silu(T* out, const T* gate_up, int64_t rows, int size, int64_t stride, cudaStream_t stream) {
  const int chunks = (size + Vector<T>::kSize - 1) / Vector<T>::kSize, threads = (chunks + kChunks - 1) / kChunks;
  const unsigned blocks = (threads + kThreads - 1) / kThreads;
  const unsigned block = blocks == 0 ? kWarp : ((threads + blocks - 1) / blocks + kWarp - 1) / kWarp * kWarp;
  launch("silu_and_mul", silu_and_mul_kernel<T, kChunks, kAligned>, dim3(rows, blocks), dim3(block), 0, stream, out, gate_up,
         size, stride);
}

}  // namespace

void silu_and_mul(void* out, const void* gate_up, int64_t rows, int size, int64_t stride, bool aligned, Dtype dtype,
                  cudaStream_t stream) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto launcher = aligned ? launch_silu<T, 2, true> : launch_silu<T, 1, false>;
    launcher(static_cast<T*>(out), static_cast<const T*>(gate_up), rows, size, stride, stream);
  });
}

}  // namespace batchinfer
