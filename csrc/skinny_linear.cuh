// The device code of skinny_linear.cu: how weights stream through shared memory into tensor cores.
//
// A tile is 16 rows of the weights. Every warp of a block takes its share of the contraction index of every tile of the block,
// in units of 64, and the partial products are added at the end of a pass (a few tiles) in the order of the warps, so results
// do not vary. A warp's pieces (16 rows x 64) come through a ring of its own: it never waits for other warps while it
// multiplies, and copies for the next pass fly while one ends.
//
// Weights are the A operand of mma.m16n8k16 and x is B: 8 rows of x are its 8 columns. Which k a fragment's place means is free as
// long as A and B agree, so lane (g, t) takes the 16 bytes at k = 8 t of row g as two consecutive fragments, in weights and x alike.
#pragma once

#include "common/device.cuh"
#include "skinny_linear.h"

namespace batchinfer {

constexpr int kTileRows = 16;
constexpr int kUnit = 64;                           // of the contraction index: 128 bytes, a cache line
constexpr int kStage = kTileRows * kUnit * 2;       // bytes
constexpr int kRowPad = 4;                          // floats, so that partial sums meet no bank twice
constexpr int kXPad = 64;                           // bytes, so that 8 rows of x meet no bank twice

__device__ __forceinline__ void copy_16_bytes(unsigned to, const void* from, bool wide) {
  if (wide)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ uint4 load_shared(unsigned from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Which rows of the weights a tile has. With silu_and_mul its upper half are the up rows that belong to the gate rows below.
struct Tiles {
  int span, upper, second, limit;

  __device__ __forceinline__ explicit Tiles(const SkinnyLinear& p)
      : span(p.silu_and_mul ? 8 : 16),
        upper(p.silu_and_mul ? 0 : 8),
        second(p.silu_and_mul ? p.weight_rows / 2 : 0),
        limit(p.silu_and_mul ? p.weight_rows / 2 : p.weight_rows) {}
  __device__ __forceinline__ int count() const { return (limit + span - 1) / span; }
  // Row j < 16 of a tile; past the last one it is repeated, and not stored.
  __device__ __forceinline__ int row(int tile, int j) const {
    const int first = tile * span;
    return j < 8 ? min(first + j, limit - 1) : second + min(first + upper + j - 8, limit - 1);
  }
};

// The pieces of a warp in the order it multiplies them: passes of kTiles tiles, units within, tiles innermost.
template <int kTiles>
struct Walk {
  int pass, end, index, unit, first_unit, end_unit, step;

  __device__ __forceinline__ bool more() const { return pass < end; }
  __device__ __forceinline__ int tile() const { return pass + index; }
  __device__ __forceinline__ void advance() {
    if (++index < min(kTiles, end - pass)) return;
    index = 0;
    unit += step;
    if (unit < end_unit) return;
    unit = first_unit;
    pass += kTiles;
  }
};

// The ring of one warp: kDepth pieces, kDepth - 1 of them on their way.
template <int kDepth, int kTiles>
struct WeightRing {
  const char* weight;
  int64_t row_bytes;
  Tiles tiles;
  Walk<kTiles> walk;
  unsigned ring;  // shared memory
  int put = 0, get = 0;
  bool wide;

  __device__ __forceinline__ const char* source(const Walk<kTiles>& at, int row, int byte) const {
    return weight + int64_t(tiles.row(at.tile(), row)) * row_bytes + at.unit * (kUnit * 2) + byte;
  }
  // Begins to copy the next piece. 8 lanes copy a row; odd rows have their halves exchanged, for the banks' sake.
  __device__ __forceinline__ void begin_copy() {
    if (walk.more()) {
      const int lane = threadIdx.x % kWarp, chunk = lane % 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 4 * i + lane / 8;
        copy_16_bytes(ring + put * kStage + row * 128 + (chunk ^ ((row & 1) * 4)) * 16, source(walk, row, chunk * 16), wide);
      }
      walk.advance();
    }
    end_copy_group();
    put = put + 1 == kDepth ? 0 : put + 1;
  }
  __device__ __forceinline__ void prefetch(int pieces) const {
    const int lane = threadIdx.x % kWarp;
    Walk<kTiles> ahead = walk;
    for (int i = 0; i < pieces && ahead.more(); ++i, ahead.advance())
      if (lane < kTileRows) prefetch_line(source(ahead, lane, 0));
  }
  // The next piece is there, for all lanes; its successors may be overwritten: the next copy begins.
  __device__ __forceinline__ unsigned next() {
    wait_for_copy_groups<kDepth - 2>();
    __syncwarp();
    begin_copy();
    const unsigned piece = ring + get * kStage;
    get = get + 1 == kDepth ? 0 : get + 1;
    return piece;
  }
};

// x of one unit as B fragments: [8 rows of x each][half of the unit].
template <int kColumns>
struct XFragments {
  uint4 values[kColumns][2];

  template <typename T>
  __device__ __forceinline__ void load_global(const T* x, int64_t stride, int rows, int unit) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        values[n][h] = n * 8 + g < rows
                           ? *reinterpret_cast<const uint4*>(x + (n * 8 + g) * stride + unit * kUnit + h * 32 + t * 8)
                           : uint4{0, 0, 0, 0};
  }
  __device__ __forceinline__ void load_shared_rows(unsigned x, int row_bytes, int rows, int unit) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        values[n][h] = n * 8 + g < rows ? load_shared(x + (n * 8 + g) * row_bytes + unit * (kUnit * 2) + h * 64 + t * 16)
                                        : uint4{0, 0, 0, 0};
  }
};

// sums[column block] += piece (16 rows x 64) times x.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_piece(float (&sums)[kColumns][4], unsigned piece, const XFragments<kColumns>& x) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const unsigned from = piece + g * 128 + ((h * 4 + t) ^ ((g & 1) * 4)) * 16;
    const uint4 low = load_shared(from), high = load_shared(from + 8 * 128);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const uint4 b = x.values[n][h];
      multiply(sums[n], low.x, high.x, low.y, high.y, b.x, b.y, T{});
      multiply(sums[n], low.z, high.z, low.w, high.w, b.z, b.w, T{});
    }
  }
}

// Norms the rows of x into shared memory. Every block does it for itself; block 0 writes x + residual.
template <typename T, int kThreads>
__device__ __forceinline__ void norm_rows(const SkinnyLinear& p, char* normed, int row_bytes, float* scratch) {
  using V = Vector<T>;
  constexpr int kRows = kSkinnyMaxNormRows;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const T* weight = static_cast<const T*>(p.norm_weight);
  float squares[kRows] = {};
#pragma unroll 2
  for (int k = threadIdx.x * V::kSize; k < p.size; k += kThreads * V::kSize) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= p.rows) continue;
      V h = V::load(x + m * p.x_stride + k);
      if (residual != nullptr) {
        const V r = V::load(residual + m * p.residual_stride + k);
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) h.values[i] = from_float<T>(to_float(h.values[i]) + to_float(r.values[i]));
        if (blockIdx.x == 0) h.store(static_cast<T*>(p.residual_out) + int64_t(m) * p.size + k);
      }
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) squares[m] += to_float(h.values[i]) * to_float(h.values[i]);
      h.store(reinterpret_cast<T*>(normed + m * row_bytes) + k);
    }
  }
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    squares[m] = warp_sum(squares[m]);
    if (lane == 0) scratch[m * kWarps + warp] = squares[m];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    if (m >= p.rows) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += scratch[m * kWarps + w];
    const float scale = rsqrtf(total / p.size + p.eps);
    for (int k = threadIdx.x * V::kSize; k < p.size; k += kThreads * V::kSize) {
      T* place = reinterpret_cast<T*>(normed + m * row_bytes) + k;
      V h = V::load(place);
      const V w = V::load(weight + k);
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) h.values[i] = from_float<T>(to_float(h.values[i]) * scale * to_float(w.values[i]));
      h.store(place);
    }
  }
  __syncthreads();
}

}  // namespace batchinfer
