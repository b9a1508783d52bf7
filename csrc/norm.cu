// RMSNorm with residual add. Bound by memory: a row stays in registers between its sum of squares and its output, so every
// input is read once. Long rows take a block each, rows of at most 32 chunks of 16 bytes (the heads of a normed query) part of a
// warp. How a row is summed depends on its length alone, so a row is normed alike in every batch. The weight is loaded before
// the previous kernel has ended.
#include "norm.h"

#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/tune.h"

namespace batchinfer {
namespace {

constexpr int kShortThreads = 256, kMaxThreads = 1024;

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
  constexpr bool kEarly = kChunks <= 2;  // more would not fit the registers beside the row
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

// kLanes threads a row with a chunk each, and kRows rows for each of them.
template <typename T, int kLanes, int kRows, bool kResidual>
__global__ void __launch_bounds__(kShortThreads) short_norm_kernel(const __grid_constant__ Norm norm) {
  using V = Vector<T>;
  constexpr int kRowsAtOnce = kShortThreads / kLanes;
  const int size = norm.size, column = threadIdx.x % kLanes * V::kSize;
  const auto row = [](int i) { return (int64_t(blockIdx.x) * kRows + i) * kRowsAtOnce + threadIdx.x / kLanes; };
  const V weight = load_chunk<T, true>(static_cast<const T*>(norm.weight), column, size);
  V x[kRows], residual[kRows];
  wait_for_previous();
  let_next_start();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int limit = row(i) < norm.rows ? size : 0;
    x[i] = load_chunk<T, true>(row_of<T>(norm.x, row(i), norm.inner), column, limit);
    if constexpr (kResidual) residual[i] = load_chunk<T, true>(row_of<T>(norm.residual, row(i), norm.inner), column, limit);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int limit = row(i) < norm.rows ? size : 0;
    if constexpr (kResidual) {
      add(x[i], residual[i]);
      store_chunk<T, true>(static_cast<T*>(norm.total) + row(i) * size, column, limit, x[i]);
    }
    float sum = sum_of_squares(x[i]);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    const float factor = rsqrtf(sum / size + norm.eps);
    store_chunk<T, true>(static_cast<T*>(norm.y) + row(i) * size, column, limit, scaled(x[i], factor, weight));
  }
}

template <typename T, int kLanes, bool kResidual, int kRows = 2>
void launch_short(const Norm& norm, cudaStream_t stream) {
  constexpr int kRowsPerBlock = kRows * kShortThreads / kLanes;
  const unsigned blocks = (norm.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  launch("rms_norm", short_norm_kernel<T, kLanes, kRows, kResidual>, dim3(blocks), dim3(kShortThreads), 0, stream, norm);
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
  if (chunks <= 32) {
    const int rows = tune("NORM_ROWS", 2);
    if (chunks > 8 && chunks <= 16 && rows == 1) return launch_short<T, 16, kResidual, 1>(norm, stream);
    if (chunks > 8 && chunks <= 16 && rows == 4) return launch_short<T, 16, kResidual, 4>(norm, stream);
  }
  if (chunks <= 8) return launch_short<T, 8, kResidual>(norm, stream);
  if (chunks <= 16) return launch_short<T, 16, kResidual>(norm, stream);
  if (chunks <= 32) return launch_short<T, 32, kResidual>(norm, stream);
  const int least = tune("NORM_CHUNKS", 1);
  if (chunks <= 512 && least <= 1) return launch_long<T, 1, 512, true, kResidual>(norm, chunks, stream);
  if (chunks <= 1024 && least <= 2) return launch_long<T, 2, 512, true, kResidual>(norm, chunks, stream);
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
