// Scale, causal mask and softmax in one pass. Bound by memory: visible scores are read once, 16 bytes at a time, neighbouring
// threads side by side, and every probability is written once. A row is kept in the registers of a warp, or of a block when it
// is longer. Rows that fit neither, or do not begin on 16 bytes, are read twice: maximum and sum are found together in the first
// pass ("online", Milakov and Gimelshein 2018).
#include "fused_softmax.h"

#include "common/chunk.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kThreads = 256;
constexpr float kLog2E = 1.4426950408889634f;

// Of a block whose rows take `warps` warps each.
constexpr int threads_of(int warps) { return warps == 1 ? kThreads : warps * kWarp; }

struct Columns {
  int begin, end;  // that the row sees

  __device__ __forceinline__ Columns(const Softmax& s, int64_t row) {
    const int query = row % s.queries;
    const int64_t batch = row / (int64_t(s.heads) * s.queries);
    end = s.ends != nullptr ? s.ends[batch * s.queries + query] : s.length - s.queries + query + 1;
    begin = s.window > 0 ? max(end - s.window, 0) : 0;
    end = min(end, s.length);
  }
  __device__ __forceinline__ bool see(int column) const { return column >= begin && column < end; }
};

// As many probabilities as 16 bytes hold scores.
template <typename P, int kSize>
struct alignas(kSize * sizeof(P)) Probabilities {
  P values[kSize];
};

// Over the kWarps warps of a row (a power of two). `scratch`: kWarps floats of shared memory of their own for each call.
template <int kWarps>
__device__ __forceinline__ float row_max(float x, float* scratch) {
  x = warp_max(x);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = warp_max(scratch[threadIdx.x % kWarps]);
  }
  return x;
}

template <int kWarps>
__device__ __forceinline__ float row_sum(float x, float* scratch) {
  x = warp_sum(x);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = scratch[threadIdx.x % kWarps];
#pragma unroll
    for (int offset = kWarps / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// kWarps warps a row (1, or the whole block), kChunks chunks of 16 bytes of scores a thread. Rows begin on 16 bytes.
template <typename S, typename P, int kChunks, int kWarps>
__global__ void __launch_bounds__(threads_of(kWarps)) softmax_kernel(const __grid_constant__ Softmax s) {
  constexpr int kSize = Vector<S>::kSize, kRowThreads = kWarps * kWarp;
  __shared__ float scratch[2][kWarps];
  const int64_t row = int64_t(blockIdx.x) * (threads_of(kWarps) / kRowThreads) + threadIdx.x / kRowThreads;
  const auto column = [](int i) { return static_cast<int>(i * kRowThreads + threadIdx.x % kRowThreads) * kSize; };
  wait_for_previous();
  let_next_start();
  if (row >= s.rows) return;
  const Columns columns(s, row);
  const S* from = static_cast<const S*>(s.scores) + row * s.length;
  P* to = static_cast<P*>(s.probs) + row * s.length;
  Vector<S> raw[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (column(i) < columns.end && column(i) + kSize > columns.begin) raw[i] = Vector<S>::load(from + column(i));
  float x[kChunks][kSize], highest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      x[i][j] = columns.see(column(i) + j) ? to_float(raw[i].values[j]) * (s.scale * kLog2E) : -INFINITY;
      highest = fmaxf(highest, x[i][j]);
    }
  highest = row_max<kWarps>(highest, scratch[0]);
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      x[i][j] = exp2f(x[i][j] - highest);
      sum += x[i][j];
    }
  sum = row_sum<kWarps>(sum, scratch[1]);
  const float factor = 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    Probabilities<P, kSize> y;
#pragma unroll
    for (int j = 0; j < kSize; ++j) y.values[j] = from_float<P>(columns.begin < columns.end ? x[i][j] * factor : 0.0f);
    if (column(i) < s.length) *reinterpret_cast<Probabilities<P, kSize>*>(to + column(i)) = y;
  }
}

// A block a row of any length and alignment, read twice.
template <typename S, typename P, bool kAligned>
__global__ void __launch_bounds__(kThreads) online_softmax_kernel(const __grid_constant__ Softmax s) {
  constexpr int kSize = Vector<S>::kSize, kWarps = kThreads / kWarp;
  __shared__ float scratch[2][kWarps];
  const int64_t row = blockIdx.x;
  wait_for_previous();
  let_next_start();
  const Columns columns(s, row);
  const S* from = static_cast<const S*>(s.scores) + row * s.length;
  P* to = static_cast<P*>(s.probs) + row * s.length;
  const float scale = s.scale * kLog2E;
  const auto load = [&](int column) {
    const bool seen = column < columns.end && column + kSize > columns.begin;
    return load_chunk<S, kAligned>(from, column, seen ? s.length : 0);
  };
  float highest = -INFINITY, sum = 0.0f;
  for (int column = threadIdx.x * kSize; column < columns.end; column += kThreads * kSize) {
    const Vector<S> raw = load(column);
    float x[kSize], before = highest;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      x[j] = columns.see(column + j) ? to_float(raw.values[j]) * scale : -INFINITY;
      highest = fmaxf(highest, x[j]);
    }
    if (sum != 0.0f) sum *= exp2f(before - highest);
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (x[j] != -INFINITY) sum += exp2f(x[j] - highest);  // or -inf - -inf would be NaN
  }
  const float of_row = row_max<kWarps>(highest, scratch[0]);
  const float factor = 1.0f / row_sum<kWarps>(sum == 0.0f ? 0.0f : sum * exp2f(highest - of_row), scratch[1]);
  for (int column = threadIdx.x * kSize; column < s.length; column += kThreads * kSize) {
    const Vector<S> raw = load(column);
    Probabilities<P, kSize> y;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      y.values[j] = from_float<P>(columns.see(column + j) ? exp2f(to_float(raw.values[j]) * scale - of_row) * factor : 0.0f);
    if constexpr (kAligned) {
      *reinterpret_cast<Probabilities<P, kSize>*>(to + column) = y;
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (column + j < s.length) to[column + j] = y.values[j];
    }
  }
}

template <typename S, typename P>
__global__ void __launch_bounds__(kThreads) naive_softmax_kernel(const __grid_constant__ Softmax s) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  wait_for_previous();
  if (row >= s.rows) return;
  const Columns columns(s, row);
  const S* from = static_cast<const S*>(s.scores) + row * s.length;
  P* to = static_cast<P*>(s.probs) + row * s.length;
  float highest = -INFINITY, sum = 0.0f;
  for (int i = columns.begin; i < columns.end; ++i) highest = fmaxf(highest, to_float(from[i]) * s.scale);
  for (int i = columns.begin; i < columns.end; ++i) sum += expf(to_float(from[i]) * s.scale - highest);
  for (int i = 0; i < s.length; ++i)
    to[i] = from_float<P>(columns.see(i) ? expf(to_float(from[i]) * s.scale - highest) / sum : 0.0f);
}

template <typename S, typename P, int kChunks, int kWarps>
void launch_rows(const Softmax& s, cudaStream_t stream) {
  constexpr int kBlock = threads_of(kWarps), kRows = kBlock / (kWarps * kWarp);
  launch("fused_softmax", softmax_kernel<S, P, kChunks, kWarps>, dim3((s.rows + kRows - 1) / kRows), dim3(kBlock), 0, stream, s);
}

template <typename S, typename P>
void launch_softmax(const Softmax& s, cudaStream_t stream) {
  constexpr int kSize = Vector<S>::kSize;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(s.probs) | reinterpret_cast<uintptr_t>(s.scores);
  if (s.length % kSize != 0 || addresses % 16 != 0)
    return launch("fused_softmax", online_softmax_kernel<S, P, false>, dim3(s.rows), dim3(kThreads), 0, stream, s);
  const int chunks = (s.length / kSize + kWarp - 1) / kWarp;  // of a thread, were a warp to take the row
  if (chunks <= 1) return launch_rows<S, P, 1, 1>(s, stream);
  if (chunks <= 2) return launch_rows<S, P, 2, 1>(s, stream);
  if (chunks <= 4) return launch_rows<S, P, 4, 1>(s, stream);
  if (chunks <= 8) return launch_rows<S, P, 8, 1>(s, stream);
  if (chunks <= 16) return launch_rows<S, P, 2, 8>(s, stream);
  if (chunks <= 32) return launch_rows<S, P, 4, 8>(s, stream);
  if (chunks <= 64) return launch_rows<S, P, 4, 16>(s, stream);
  if (chunks <= 128) return launch_rows<S, P, 4, 32>(s, stream);
  launch("fused_softmax", online_softmax_kernel<S, P, true>, dim3(s.rows), dim3(kThreads), 0, stream, s);
}

// Calls `body` with values of the element types of scores and of probabilities.
template <typename Body>
void dispatch_pair(Dtype from, Dtype to, Body&& body) {
  if (from == to) return dispatch(from, [&](auto zero) { body(zero, zero); });
  if (from != Dtype::kFloat32) throw std::invalid_argument("fused_softmax: half scores give probabilities of their own type");
  dispatch_half(to, [&](auto zero) { body(float{}, zero); });
}

}  // namespace

void fused_softmax(const Softmax& softmax, Dtype from, Dtype to, cudaStream_t stream) {
  dispatch_pair(from, to, [&](auto s, auto p) { launch_softmax<decltype(s), decltype(p)>(softmax, stream); });
}

void fused_softmax_naive(const Softmax& softmax, Dtype from, Dtype to, cudaStream_t stream) {
  dispatch_pair(from, to, [&](auto s, auto p) {
    launch("fused_softmax_naive", naive_softmax_kernel<decltype(s), decltype(p)>, dim3((softmax.rows + kThreads - 1) / kThreads),
           dim3(kThreads), 0, stream, softmax);
  });
}

}  // namespace batchinfer
