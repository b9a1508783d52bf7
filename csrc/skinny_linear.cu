// Matrix products of few rows. Bound by memory: the weights are read once, and next to nothing else is.
//
// One block for each multiprocessor, with rings as deep as shared memory holds. The next kernel's block takes its place while
// other blocks still work, and reads its first weights, which depend on nothing, before it waits: so the memory stays busy
// between kernels.
#include "skinny_linear.h"

#include <stdexcept>

#include "common/launch.h"
#include "skinny_linear.cuh"

namespace batchinfer {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

// Adds the partial sums [warps][rows][R * 16 + pad] of all warps and stores the outputs of the pass that begins with `first`.
template <typename T, int kTiles>
__device__ __forceinline__ void store_outputs(const SkinnyLinear& p, const Outputs& outputs, const float* partial, int first,
                                              int end) {
  constexpr int kStride = kTiles * kTileRows + kRowPad;
  const int warp_stride = p.rows * kStride;
  const T* bias = static_cast<const T*>(p.bias);
  auto total = [&](int m, int j, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w * warp_stride + m * kStride + j];
    return bias == nullptr ? sum : sum + to_float(bias[row]);
  };
  const int columns = kTiles * outputs.tile, all = p.silu_and_mul ? p.weight_rows / 2 : p.weight_rows;
  for (int i = threadIdx.x; i < p.rows * columns; i += kThreads) {
    const int m = i / columns, j = i % columns, output = first + j;
    if (output >= end) continue;
    T y;
    if (p.silu_and_mul) {
      const int at = j / 8 * kTileRows + j % 8;
      const float gate = to_float(from_float<T>(total(m, at, output)));
      const float up = to_float(from_float<T>(total(m, at + 8, outputs.upper_row + output)));
      y = from_float<T>(gate / (1.0f + __expf(-gate)) * up);
    } else {
      y = from_float<T>(total(m, j, output));
    }
    static_cast<T*>(p.out)[int64_t(m) * all + output] = y;
  }
}

template <int kTiles, int kColumns>
__device__ __forceinline__ void store_partial(float* partial, int rows, const float (&sums)[kTiles][kColumns][4]) {
  constexpr int kStride = kTiles * kTileRows + kRowPad;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int m = n * 8 + 2 * t + c;
      if (m >= rows) continue;
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        partial[m * kStride + r * kTileRows + g] = sums[r][n][c];
        partial[m * kStride + r * kTileRows + g + 8] = sums[r][n][c + 2];
      }
    }
}

template <int kTiles>
__host__ __device__ constexpr int partial_floats(int rows) { return rows * (kTiles * kTileRows + kRowPad); }

__host__ __device__ constexpr int partial_buffers(int rows) { return rows <= 4 ? 2 : 1; }

// kColumns: blocks of 8 rows of x. kNorm: 0, or how many vectors of x a thread norms; x then stays in shared memory, while else
// it comes through the rings.
template <typename T, int kColumns, int kTiles, int kDepth, int kNorm>
__global__ void __launch_bounds__(kThreads, 1) skinny_linear_kernel(const SkinnyLinear p) {
  using Feed = Ring<kTiles, kDepth, (kNorm > 0 ? 0 : kColumns)>;
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / kWarp, ring_bytes = kDepth * Feed::stage_bytes(p.rows);
  float* partial = reinterpret_cast<float*>(shared + kWarps * ring_bytes);
  const int buffers = partial_buffers(p.rows), buffer = kWarps * partial_floats<kTiles>(p.rows);
  const unsigned normed = shared_address(partial + buffers * buffer);
  const int normed_bytes = p.size * 2 + kXPad;

  let_next_start();
  const Outputs outputs(p);
  const Share share(warp, kWarps, p.size);
  Feed ring(p, outputs, share, shared_address(shared) + warp * ring_bytes);
  if constexpr (kNorm > 0) {
    const RowNorm<T, kThreads, kNorm> norm(p);
    wait_for_previous();
    norm.run(p, normed, normed_bytes, partial);
  } else {
    wait_for_previous();
    ring.begin_x();
  }
  int which = 0;
  const int per_pass = outputs.per_pass<kTiles>();
  for (int first = outputs.first; first < outputs.end; first += per_pass) {
    float sums[kTiles][kColumns][4] = {};
    for (int i = 0; i < share.count; ++i) {
      WeightFragments<kTiles> w;
      XFragments<kColumns> x;
      if constexpr (kNorm > 0) load_normed<kColumns>(x, normed, normed_bytes, p.rows, share.unit(i));
      ring.take(w, x);
      multiply<T, kTiles, kColumns>(sums, w, x);
    }
    float* buffered = partial + which * buffer;
    store_partial<kTiles, kColumns>(buffered + warp * (buffer / kWarps), p.rows, sums);
    __syncthreads();
    store_outputs<T, kTiles>(p, outputs, buffered, first, min(outputs.end, first + per_pass));
    if (buffers == 1) __syncthreads();
    which ^= buffers - 1;
  }
}

template <typename T, int kColumns, int kTiles, int kDepth, int kNorm>
size_t shared_bytes(const SkinnyLinear& p) {
  using Feed = Ring<kTiles, kDepth, (kNorm > 0 ? 0 : kColumns)>;
  const size_t partial = partial_buffers(p.rows) * partial_floats<kTiles>(p.rows) * sizeof(float);
  const size_t normed = kNorm > 0 ? size_t(p.rows) * (p.size * 2 + kXPad) : 0;
  return kWarps * (kDepth * Feed::stage_bytes(p.rows) + partial) + normed;
}

template <typename T, int kColumns, int kTiles, int kDepth, int kNorm>
bool run_if_it_fits(const SkinnyLinear& p, cudaStream_t stream) {
  const size_t smem = shared_bytes<T, kColumns, kTiles, kDepth, kNorm>(p);
  if (smem > size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))) return false;
  auto* kernel = skinny_linear_kernel<T, kColumns, kTiles, kDepth, kNorm>;
  launch("skinny_linear", kernel, dim3(num_multiprocessors()), dim3(kThreads), smem, stream, p);
  return true;
}

// The deepest rings that the device's shared memory holds: 227 KB on Hopper, 163 KB on A100, 99 KB on other cards.
template <typename T, int kColumns, int kNorm>
void run(const SkinnyLinear& p, cudaStream_t stream) {
  if (run_if_it_fits<T, kColumns, 2, (kColumns == 1 ? 5 : 4), kNorm>(p, stream)) return;
  if (run_if_it_fits<T, kColumns, 2, 3, kNorm>(p, stream)) return;
  if (run_if_it_fits<T, kColumns, 1, (kColumns == 1 ? 3 : 2), kNorm>(p, stream)) return;
  throw std::runtime_error("skinny_linear: this device has too little shared memory");
}

}  // namespace

void skinny_linear(const SkinnyLinear& p, Dtype dtype, cudaStream_t stream) {
  dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.norm_weight != nullptr)
      p.rows * p.size <= kSkinnyMaxNormed / 2 ? run<T, 1, 2>(p, stream) : run<T, 1, 4>(p, stream);
    else
      p.rows <= 8 ? run<T, 1, 0>(p, stream) : run<T, 2, 0>(p, stream);
  });
}

}  // namespace batchinfer
