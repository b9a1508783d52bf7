// RMSNorm with residual add. Bound by memory: a row stays in registers between its sum of squares and its output, so every
// input is read once. Long rows take a block each, rows of at most 32 chunks of 16 bytes (the heads of a normed query) part of a
// warp. How a row is summed depends on its length alone, so a row is normed alike in every batch. The weight is loaded before
// the previous kernel has ended.
#include "norm.h"

#include "common/chunk.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kShortThreads = 256, kThreads = 512, kMaxThreads = 1024;
constexpr int kElements = 16;  // of a long row, a thread's: with fewer, more threads wait for each other's sums

template <typename T>
__device__ __forceinline__ const T* row_of(const NormRows& rows, int64_t row, int inner) {
  const unsigned outer = static_cast<unsigned>(row) / inner, rest = static_cast<unsigned>(row) - outer * inner;
  return static_cast<const T*>(rows.data) + outer * rows.outer_stride + rest * rows.inner_stride;
}

// x + residual in the element type, as it is then normed.
template <typename T>
__device__ __forceinline__ void add(Vector<T>& x, const Vector<T>& residual) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) x.values[i] = from_float<T>(to_float(x.values[i]) + to_float(residual.values[i]));
}

template <typename T>
__device__ __forceinline__ float sum_of_squares(const Vector<T>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) sum += to_float(x.values[i]) * to_float(x.values[i]);
  return sum;
}

template <typename T>
__device__ __forceinline__ Vector<T> scaled(const Vector<T>& x, float factor, const Vector<T>& weight) {
  Vector<T> y;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i)
    y.values[i] = from_float<T>(to_float(x.values[i]) * factor * to_float(weight.values[i]));
  return y;
}

// A block a row; a thread has the chunks threadIdx.x + i * blockDim.x of it.
template <typename T, int kChunks, int kThreads, bool kAligned, bool kResidual>
__global__ void __launch_bounds__(kThreads) long_norm_kernel(const __grid_constant__ Norm norm) {
  using V = Vector<T>;
  constexpr bool kEarly = kThreads < kMaxThreads;  // else it would not fit the registers beside the row
  __shared__ float scratch[kWarp];
  const int64_t row = blockIdx.x;
  const int size = norm.size;
  const auto column = [](int i) { return static_cast<int>(threadIdx.x + i * blockDim.x) * V::kSize; };
  V weight[kChunks], x[kChunks], residual[kChunks];
  const auto load_weight = [&] {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) weight[i] = load_chunk<T, kAligned>(static_cast<const T*>(norm.weight), column(i), size);
  };
  if constexpr (kEarly) load_weight();
  wait_for_previous();
  let_next_start();
  const T* from = row_of<T>(norm.x, row, norm.inner);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) x[i] = load_chunk<T, kAligned>(from, column(i), size);
  if constexpr (kResidual) {
    from = row_of<T>(norm.residual, row, norm.inner);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) residual[i] = load_chunk<T, kAligned>(from, column(i), size);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      add(x[i], residual[i]);
      store_chunk<T, kAligned>(static_cast<T*>(norm.total) + row * size, column(i), size, x[i]);
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) sum += sum_of_squares(x[i]);
  const float factor = rsqrtf(block_sum(sum, scratch) / size + norm.eps);
  if constexpr (!kEarly) load_weight();
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    store_chunk<T, kAligned>(static_cast<T*>(norm.y) + row * size, column(i), size, scaled(x[i], factor, weight[i]));
}

// kLanes threads a row with a chunk each.
template <typename T, int kLanes, bool kResidual>
__global__ void __launch_bounds__(kShortThreads) short_norm_kernel(const __grid_constant__ Norm norm) {
  using V = Vector<T>;
  const int64_t row = int64_t(blockIdx.x) * (kShortThreads / kLanes) + threadIdx.x / kLanes;
  const int size = norm.size, column = threadIdx.x % kLanes * V::kSize, limit = row < norm.rows ? size : 0;
  const V weight = load_chunk<T, true>(static_cast<const T*>(norm.weight), column, size);
  wait_for_previous();
  let_next_start();
  V x = load_chunk<T, true>(row_of<T>(norm.x, row, norm.inner), column, limit);
  if constexpr (kResidual) {
    add(x, load_chunk<T, true>(row_of<T>(norm.residual, row, norm.inner), column, limit));
    store_chunk<T, true>(static_cast<T*>(norm.total) + row * size, column, limit, x);
  }
  float sum = sum_of_squares(x);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  const float factor = rsqrtf(sum / size + norm.eps);
  store_chunk<T, true>(static_cast<T*>(norm.y) + row * size, column, limit, scaled(x, factor, weight));
}

template <typename T, int kLanes, bool kResidual>
void launch_short(const Norm& norm, cudaStream_t stream) {
  constexpr int kRows = kShortThreads / kLanes;
  const unsigned blocks = (norm.rows + kRows - 1) / kRows;
  launch("rms_norm", short_norm_kernel<T, kLanes, kResidual>, dim3(blocks), dim3(kShortThreads), 0, stream, norm);
}

template <typename T, int kChunks, int kThreads, bool kAligned, bool kResidual>
void launch_long(const Norm& norm, int chunks, cudaStream_t stream) {
  const unsigned threads = ((chunks + kChunks - 1) / kChunks + kWarp - 1) / kWarp * kWarp;
  launch("rms_norm", long_norm_kernel<T, kChunks, kThreads, kAligned, kResidual>, dim3(norm.rows), dim3(threads), 0, stream,
         norm);
}

template <typename T, bool kResidual>
void dispatch_size(const Norm& norm, cudaStream_t stream) {
  const int chunks = (norm.size + Vector<T>::kSize - 1) / Vector<T>::kSize;
  if (!norm.aligned) return launch_long<T, 4, kMaxThreads, false, kResidual>(norm, chunks, stream);
  if (chunks <= 8) return launch_short<T, 8, kResidual>(norm, stream);
  if (chunks <= 16) return launch_short<T, 16, kResidual>(norm, stream);
  if (chunks <= 32) return launch_short<T, 32, kResidual>(norm, stream);
  constexpr int kChunks = kElements / Vector<T>::kSize;
  if (chunks <= kChunks * kThreads) return launch_long<T, kChunks, kThreads, true, kResidual>(norm, chunks, stream);
  launch_long<T, 4, kMaxThreads, true, kResidual>(norm, chunks, stream);
}

}  // namespace

int max_norm_size(Dtype dtype) { return 4 * kMaxThreads * (dtype == Dtype::kFloat32 ? 4 : 8); }

void rms_norm(const Norm& norm, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (norm.residual.data == nullptr)
      dispatch_size<T, false>(norm, stream);
    else
      dispatch_size<T, true>(norm, stream);
  });
}

}  // namespace batchinfer
