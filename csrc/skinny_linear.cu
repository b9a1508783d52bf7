// Matrix products of few rows. Bound by memory: the weights are read once, and next to nothing else is.
//
// One block for each multiprocessor, small enough that two fit: the next product's block begins to read its weights (which
// depend on nothing) while this one ends.
#include "skinny_linear.h"

#include <cstdio>
#include <cstdlib>

#include "common/launch.h"
#include "skinny_linear.cuh"

namespace batchinfer {
namespace {

struct Tuning {
  bool interleave, wide;
  int prefetch;
  int carveout;
};

// Adds the partial sums [warps][rows][R * 16 + pad] of all warps and stores the outputs of `count` tiles from `pass` on.
template <typename T, int kTiles, int kWarps>
__device__ __forceinline__ void store_outputs(const SkinnyLinear& p, const Tiles& tiles, const float* partial, int pass, int count) {
  constexpr int kStride = kTiles * kTileRows + kRowPad;
  const int warp_stride = p.rows * kStride;
  const T* bias = static_cast<const T*>(p.bias);
  auto total = [&](int m, int j, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w * warp_stride + m * kStride + j];
    return bias == nullptr ? sum : sum + to_float(bias[row]);
  };
  const int span = tiles.span, columns = kTiles * span;
  for (int i = threadIdx.x; i < p.rows * columns; i += kWarps * kWarp) {
    const int m = i / columns, j = i % columns, output = pass * span + j;
    if (j >= count * span || output >= tiles.limit) continue;
    T y;
    if (p.silu_and_mul) {
      const int at = j / 8 * kTileRows + j % 8;
      const float gate = to_float(from_float<T>(total(m, at, output)));
      const float up = to_float(from_float<T>(total(m, at + 8, tiles.second + output)));
      y = from_float<T>(gate / (1.0f + __expf(-gate)) * up);
    } else {
      y = from_float<T>(total(m, j, output));
    }
    static_cast<T*>(p.out)[int64_t(m) * tiles.limit + output] = y;
  }
}

template <int kColumns, int kTiles>
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

template <typename T, int kColumns, int kTiles, int kDepth, int kWarps, bool kNorm>
__global__ void __launch_bounds__(kWarps* kWarp, 1) skinny_linear_kernel(const SkinnyLinear p, const Tuning tuning) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kBuffers = kColumns == 1 ? 2 : 1;
  const int warp = threadIdx.x / kWarp, units = p.size / kUnit;
  float* partial = reinterpret_cast<float*>(shared + kWarps * kDepth * kStage);
  const int buffer = kWarps * p.rows * (kTiles * kTileRows + kRowPad);
  char* normed = reinterpret_cast<char*>(partial + kBuffers * buffer);
  const int normed_bytes = p.size * 2 + kXPad;

  const Tiles tiles(p);
  const int first_tile = int64_t(tiles.count()) * blockIdx.x / gridDim.x;
  const int end_tile = int64_t(tiles.count()) * (blockIdx.x + 1) / gridDim.x;
  const int first = tuning.interleave ? warp : warp * units / kWarps;
  const int end = tuning.interleave ? units : (warp + 1) * units / kWarps;
  const int step = tuning.interleave ? kWarps : 1;
  WeightRing<kDepth, kTiles> ring{static_cast<const char*>(p.weight), int64_t(p.size) * 2, tiles,
                                  {first_tile, first < end ? end_tile : first_tile, 0, first, first, end, step},
                                  shared_address(shared) + warp * kDepth * kStage};
  ring.wide = tuning.wide;
  for (int i = 0; i < kDepth - 1; ++i) ring.begin_copy();
  ring.prefetch(tuning.prefetch);
  if (kNorm)
    for (int k = threadIdx.x * kUnit; k < p.size; k += kWarps * kWarp * kUnit)
      prefetch_line(static_cast<const T*>(p.norm_weight) + k);
  let_next_start();
  wait_for_previous();
  if constexpr (kNorm) norm_rows<T, kWarps * kWarp>(p, normed, normed_bytes, partial);

  const T* x = static_cast<const T*>(p.x);
  XFragments<kColumns> now, later;
  if (!kNorm && first < end) later.load_global(x, p.x_stride, p.rows, first);
  int which = 0;
  for (int pass = first_tile; pass < end_tile; pass += kTiles) {
    const int count = min(kTiles, end_tile - pass);
    float sums[kTiles][kColumns][4] = {};
    for (int unit = first; unit < end; unit += step) {
      if constexpr (kNorm) {
        now.load_shared_rows(shared_address(normed), normed_bytes, p.rows, unit);
      } else {
        now = later;
        later.load_global(x, p.x_stride, p.rows, unit + step < end ? unit + step : first);
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
        if (r < count) multiply_piece<T, kColumns>(sums[r], ring.next(), now);
    }
    float* buffered = partial + which * buffer;
    store_partial<kColumns, kTiles>(buffered + warp * (buffer / kWarps), p.rows, sums);
    __syncthreads();
    store_outputs<T, kTiles, kWarps>(p, tiles, buffered, pass, count);
    if (kBuffers == 1) __syncthreads();
    which ^= kBuffers - 1;
  }
}

template <typename T, int kColumns, int kTiles, int kDepth, int kWarps, bool kNorm>
void run(const SkinnyLinear& p, const Tuning& tuning, cudaStream_t stream) {
  const int buffers = kColumns == 1 ? 2 : 1;
  size_t smem = kWarps * kDepth * kStage + buffers * kWarps * p.rows * (kTiles * kTileRows + kRowPad) * sizeof(float);
  if (kNorm) smem += size_t(p.rows) * (p.size * 2 + kXPad);
  auto* kernel = skinny_linear_kernel<T, kColumns, kTiles, kDepth, kWarps, kNorm>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, tuning.carveout ? 100 : -1), "carveout");
  launch("skinny_linear", skinny_linear_kernel<T, kColumns, kTiles, kDepth, kWarps, kNorm>, dim3(num_multiprocessors()),
         dim3(kWarps * kWarp), smem, stream, p, tuning);
}

}  // namespace

void skinny_linear(const SkinnyLinear& p, Dtype dtype, cudaStream_t stream) {
  int tiles = 2, depth = 6, warps = 8, interleave = 1, wide = 0, prefetch = 0, carveout = 1;
  if (const char* text = std::getenv("BATCHINFER_SKINNY"))
    std::sscanf(text, "%d,%d,%d,%d,%d,%d,%d", &tiles, &depth, &warps, &interleave, &wide, &prefetch, &carveout);
  const Tuning tuning{interleave != 0, wide != 0, prefetch, carveout};
  dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    bool done = false;
    auto consider = [&]<int kTiles, int kDepth, int kWarps>() {
      if (done || tiles != kTiles || depth != kDepth || warps != kWarps) return;
      done = true;
      if (p.norm_weight != nullptr)
        run<T, 1, kTiles, kDepth, kWarps, true>(p, tuning, stream);
      else if (p.rows <= 8)
        run<T, 1, kTiles, kDepth, kWarps, false>(p, tuning, stream);
      else
        run<T, 2, kTiles, kDepth, kWarps, false>(p, tuning, stream);
    };
    consider.template operator()<2, 6, 8>();
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      consider.template operator()<1, 6, 8>();
      consider.template operator()<4, 5, 8>();
      consider.template operator()<2, 4, 8>();
      consider.template operator()<2, 12, 8>();
      consider.template operator()<1, 12, 4>();
      consider.template operator()<2, 12, 4>();
      consider.template operator()<4, 12, 4>();
      consider.template operator()<2, 24, 4>();
    }
    if (!done) throw std::invalid_argument("no such skinny variant");
  });
}

}  // namespace batchinfer
