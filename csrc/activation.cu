// SiLU-and-multiply. Bound by memory: every input is read once and every output written once, 16 bytes at a time.
#include "activation.h"

#include "common/device.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(T* out, const T* gate_up, int64_t size, int64_t stride) {
  using V = Vector<T>;
  const int64_t row = blockIdx.y, column = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V::kSize;
  wait_for_previous();
  let_next_start();
  if (column >= size) return;
  const V gate = V::load(gate_up + row * stride + column), up = V::load(gate_up + row * stride + size + column);
  V y;
#pragma unroll
  for (int i = 0; i < V::kSize; ++i) {
    const float g = to_float(gate.values[i]);
    y.values[i] = from_float<T>(g / (1.0f + __expf(-g)) * to_float(up.values[i]));
  }
  y.store(out + row * size + column);
}

}  // namespace

void silu_and_mul(void* out, const void* gate_up, int64_t rows, int64_t size, int64_t stride, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const unsigned blocks = (size / Vector<T>::kSize + kThreads - 1) / kThreads;
    launch("silu_and_mul", silu_and_mul_kernel<T>, dim3(blocks, rows), dim3(kThreads), 0, stream, static_cast<T*>(out),
           static_cast<const T*>(gate_up), size, stride);
  });
}

}  // namespace batchinfer
