// Matrix products of few rows. Bound by memory: the weights are read once, and next to nothing else is.
//
// One block for each multiprocessor. The next kernel is let start when a block has begun its last reads, so that its own first
// reads of weights (which depend on nothing) keep the memory busy while this one ends.
#include "skinny_linear.h"

#include <cstdio>
#include <cstdlib>

#include "common/launch.h"
#include "skinny_linear.cuh"

namespace batchinfer {
namespace {

struct Tuning {
  int early;
  bool rotate, pair, sync;
};

// Adds the partial sums [warps][rows][R * 16 + pad] of all warps and stores the outputs of the pass that begins with `first`.
template <typename T, int kTiles, int kWarps>
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
  for (int i = threadIdx.x; i < p.rows * columns; i += kWarps * kWarp) {
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

// kAhead: how many units of x are loaded ahead into registers; 0: x lies in shared memory.
template <typename T, int kColumns, int kTiles, int kDepth, int kWarps, int kAhead, int kNorm>
__global__ void __launch_bounds__(kWarps* kWarp, kTiles * kDepth <= 6 ? 2 : 1)
    skinny_linear_kernel(const SkinnyLinear p, const Tuning tuning) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kRing = kDepth * kTiles * kPiece, kUnroll = kAhead > 0 ? kAhead : 1;
  const int warp = threadIdx.x / kWarp;
  float* partial = reinterpret_cast<float*>(shared + kWarps * kRing);
  const int buffers = partial_buffers(p.rows), buffer = kWarps * partial_floats<kTiles>(p.rows);
  char* staged = reinterpret_cast<char*>(partial + buffers * buffer);
  const int staged_bytes = p.size * 2 + kXPad;

  const Outputs outputs(p);
  const Share share = Share::of_warp<kWarps>(warp, p.size, tuning.rotate, tuning.pair);
  WeightRing<kTiles, kDepth> ring(p, outputs, share, shared_address(shared) + warp * kRing, tuning.early);
  const T* x = static_cast<const T*>(p.x);
  XFragments<kColumns> xs[kUnroll];
  if constexpr (kNorm > 0) {
    const RowNorm<T, kWarps * kWarp, kNorm> norm(p);
    wait_for_previous();
    norm.run(p, staged, staged_bytes, partial);
  } else if constexpr (kAhead == 0) {
    wait_for_previous();
    copy_rows<T, kWarps * kWarp>(p, staged, staged_bytes);
  } else {
    wait_for_previous();
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (a < share.count) xs[a].load_global(x, p.x_stride, p.rows, share.unit(a));
  }
  int which = 0;
  const int per_pass = outputs.per_pass<kTiles>();
  for (int first = outputs.first; first < outputs.end; first += per_pass) {
    float sums[kTiles][kColumns][4] = {};
    for (int base = 0; base < share.count; base += kUnroll) {
#pragma unroll
      for (int a = 0; a < kUnroll; ++a) {
        if (base + a >= share.count) break;
        if constexpr (kAhead == 0) xs[a].load_staged(shared_address(staged), staged_bytes, p.rows, share.unit(base));
        WeightFragments<kTiles> w;
        ring.take(w);
        multiply<T, kTiles, kColumns>(sums, w, xs[a]);
        if constexpr (kAhead > 0) {
          const int next = base + a + kAhead < share.count ? base + a + kAhead : a;  // after the last: the next pass's first
          xs[a].load_global(x, p.x_stride, p.rows, share.unit(next));
        }
        if (tuning.sync && (base + a) % 4 == 3 && base + a + 1 <= p.size / kUnit / kWarps) __syncthreads();
      }
    }
    float* buffered = partial + which * buffer;
    store_partial<kTiles, kColumns>(buffered + warp * (buffer / kWarps), p.rows, sums);
    __syncthreads();
    store_outputs<T, kTiles, kWarps>(p, outputs, buffered, first, min(outputs.end, first + per_pass));
    if (buffers == 1) __syncthreads();
    which ^= buffers - 1;
  }
}

template <typename T, int kColumns, int kTiles, int kDepth, int kWarps, int kAhead, int kNorm>
void run(const SkinnyLinear& p, const Tuning& tuning, cudaStream_t stream) {
  size_t smem = kWarps * (kDepth * kTiles * kPiece + partial_buffers(p.rows) * partial_floats<kTiles>(p.rows) * sizeof(float));
  if (kAhead == 0) smem += size_t(p.rows) * (p.size * 2 + kXPad);
  auto* kernel = skinny_linear_kernel<T, kColumns, kTiles, kDepth, kWarps, kAhead, kNorm>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), "carveout");
  launch("skinny_linear", kernel, dim3(num_multiprocessors()), dim3(kWarps * kWarp), smem, stream, p, tuning);
}

}  // namespace

void skinny_linear(const SkinnyLinear& p, Dtype dtype, cudaStream_t stream) {
  // staged: tiles, depth; streamed 1: tiles, depth, ahead; streamed 2: same; early; stage limit KB; rotate, pair, sync
  int v[13] = {1, 5, 2, 3, 3, 2, 2, 2, 1000000, 46, 0, 0, 0};
  if (const char* text = std::getenv("BATCHINFER_SKINNY"))
    std::sscanf(text, "%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d", v, v + 1, v + 2, v + 3, v + 4, v + 5, v + 6, v + 7, v + 8, v + 9,
                v + 10, v + 11, v + 12);
  const Tuning tuning{v[8], v[10] != 0, v[11] != 0, v[12] != 0};
  const bool norm = p.norm_weight != nullptr, staged = norm || (p.rows <= 8 && int64_t(p.rows) * p.size * 2 <= v[9] * 1024);
  dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr bool kAll = std::is_same_v<T, __nv_bfloat16>;
    const int columns = p.rows <= 8 ? 1 : 2;
    const int* at = staged ? v : columns == 1 ? v + 2 : v + 5;
    const int tiles = at[0], depth = at[1], ahead = staged ? 0 : at[2];
    bool done = false;
    auto consider = [&]<int kColumns, int kTiles, int kDepth, int kAhead>() {
      if (done || columns != kColumns || tiles != kTiles || depth != kDepth || ahead != kAhead) return;
      if constexpr (kAhead == 0)
        if (norm) {
          const int vectors = ((p.rows == 3 ? 4 : p.rows) * p.size + 2047) / 2048;
          if (vectors <= 2)
            run<T, kColumns, kTiles, kDepth, 8, kAhead, 2>(p, tuning, stream);
          else if (vectors <= 4)
            run<T, kColumns, kTiles, kDepth, 8, kAhead, 4>(p, tuning, stream);
          else
            run<T, kColumns, kTiles, kDepth, 8, kAhead, 8>(p, tuning, stream);
          done = true;
        }
      if (!done) run<T, kColumns, kTiles, kDepth, 8, kAhead, 0>(p, tuning, stream), done = true;
    };
    consider.template operator()<1, 1, 5, 0>();
    consider.template operator()<1, 2, 3, 3>();
    consider.template operator()<2, 2, 2, 2>();
    if constexpr (kAll) {
      consider.template operator()<1, 1, 6, 0>();
      consider.template operator()<1, 2, 3, 0>();
      consider.template operator()<1, 2, 5, 0>();
      consider.template operator()<1, 4, 2, 0>();
      consider.template operator()<1, 2, 5, 4>();
      consider.template operator()<1, 4, 2, 2>();
      consider.template operator()<1, 4, 2, 3>();
      consider.template operator()<1, 1, 5, 4>();
      consider.template operator()<2, 2, 5, 2>();
      consider.template operator()<2, 4, 2, 2>();
      consider.template operator()<2, 1, 5, 3>();
    }
    if (!done) throw std::invalid_argument("no such skinny variant");
  });
}

}  // namespace batchinfer
