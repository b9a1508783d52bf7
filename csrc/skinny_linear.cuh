// The device code of skinny_linear.cu: how weights stream through shared memory into tensor cores.
//
// A block computes a range of outputs, in passes of a few tiles of 16 rows of the weights. Each of its warps takes its share of
// the contraction index, in units of 64, and the partial products are added at the end of a pass in the order of the warps, so
// results do not vary. What a warp reads comes through a ring of its own: it never waits for other warps while it
// multiplies, and copies for the next pass fly while one ends.
//
// Weights are the A operand of mma.m16n8k16 and x is B: 8 rows of x are its 8 columns. Which k a fragment's place means is free as
// long as A and B agree, so lane (g, t) takes the 16 bytes at k = 8 t of row g as two consecutive fragments, in weights and x alike.
#pragma once

#include "common/device.cuh"
#include "skinny_linear.h"

namespace batchinfer {

constexpr int kTileRows = 16;
constexpr int kUnit = 64;                      // of the contraction index: 128 bytes, a cache line
constexpr int kPiece = kTileRows * kUnit * 2;  // bytes of a tile's unit
constexpr int kRowPad = 4;                     // floats, so that partial sums meet no bank twice
constexpr int kXPad = 64;                      // bytes, so that 8 rows of x meet no bank twice

__device__ __forceinline__ void copy_16_bytes(unsigned to, const void* from) {
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

// Which outputs a block computes, and from which rows of the weights. A tile is 16 outputs; with silu_and_mul it is 8, and its
// upper half holds the up rows that belong to the gate rows of its lower half.
struct Outputs {
  int first, end, tile, upper_row;

  __device__ __forceinline__ explicit Outputs(const SkinnyLinear& p) {
    const int all = p.silu_and_mul ? p.weight_rows / 2 : p.weight_rows;
    first = int64_t(all) * blockIdx.x / gridDim.x;
    end = int64_t(all) * (blockIdx.x + 1) / gridDim.x;
    tile = p.silu_and_mul ? 8 : 16;
    upper_row = p.silu_and_mul ? all : 8;
  }
  // A pass computes at most kTiles tiles; all passes about the same number of outputs, so that none has little to read.
  template <int kTiles>
  __device__ __forceinline__ int passes() const { return (end - first + kTiles * tile - 1) / (kTiles * tile); }
  template <int kTiles>
  __device__ __forceinline__ int per_pass() const { return (end - first + passes<kTiles>() - 1) / max(passes<kTiles>(), 1); }
};

// A warp's share of the contraction index: `count` units, beginning with the `start`-th of them and going round.
struct Share {
  int first, step, count, start;
  bool pair;

  template <int kWarps>
  __device__ __forceinline__ static Share of_warp(int warp, int size, bool rotate, bool pair) {
    const int units = size / kUnit;
    if (pair && units % (2 * kWarps) == 0) return {2 * warp, kWarps, units / kWarps, 0, true};
    const int count = (units - warp + kWarps - 1) / kWarps;
    return {warp, kWarps, count, rotate && count > 0 ? int(blockIdx.x * 5) % count : 0, false};
  }
  // The unit at place i < 2 * count of the order.
  __device__ __forceinline__ int unit(int i) const {
    i += start;
    if (i >= count) i -= count;
    return pair ? first + (i / 2) * 2 * step + i % 2 : first + i * step;
  }
};

// Fragments of kTiles tiles and one unit: [tile][half of the unit][rows g, rows g + 8].
template <int kTiles>
using WeightFragments = uint4[kTiles][2][2];

// The ring of one warp: kDepth stages of kTiles pieces, all of them on their way except while one is taken.
template <int kTiles, int kDepth>
class WeightRing {
 public:
  static constexpr int kStage = kTiles * kPiece;

  __device__ __forceinline__ WeightRing(const SkinnyLinear& p, const Outputs& outputs, const Share& share, unsigned ring, int early)
      : outputs_(outputs), share_(share), weight_(static_cast<const uint4*>(p.weight)), row_(p.size / 8), ring_(ring), early_(early) {
    const int lane = threadIdx.x % kWarp;
    const int g = lane / 4, t = lane % 4;
    // 8 lanes copy a row; odd rows have their halves exchanged, for the banks' sake.
    put_ = lane / 8 * 128 + ((lane % 8) ^ (lane / 8 % 2 * 4)) * 16;
    get_ = g * 128 + (t ^ (g % 2 * 4)) * 16;
    left_ = share.count * outputs.passes<kTiles>();
    per_pass_ = outputs.per_pass<kTiles>();
    begin_pass(outputs.first);
    for (int i = 0; i < kDepth; ++i) begin_copy(i);
    if (left_ <= early_) let_next_start();
  }

  // The next stage, once it is there; the copy that takes its place begins.
  __device__ __forceinline__ void take(WeightFragments<kTiles>& to) {
    wait_for_copy_groups<kDepth - 1>();
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
          to[r][h][upper] = load_shared(ring_ + slot_ * kStage + r * kPiece + upper * 1024 + (get_ ^ (h * 64)));
    __syncwarp();
    begin_copy(slot_);
    if (left_ == early_) let_next_start();
    slot_ = slot_ + 1 == kDepth ? 0 : slot_ + 1;
  }

 private:
  __device__ __forceinline__ void begin_pass(int output) {
    const int lane = threadIdx.x % kWarp;
    const int end = min(outputs_.end, output + per_pass_);
    next_pass_ = end;
    unit_ = 0;
    inside_ = 0;
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = output + r * outputs_.tile + i % 2 * 4 + lane / 8;  // rows 0-3, 4-7, 8-11, 12-15
        const int row = at + (i < 2 ? 0 : outputs_.upper_row);
        // A plain tile's upper rows are further outputs; those of silu_and_mul belong to the same ones.
        const bool mine = (outputs_.tile == 16 ? row : at) < end;
        inside_ |= unsigned(mine) << (r * 4 + i);
        source_[r][i] = unsigned(row) * unsigned(row_) + lane % 8;
      }
  }

  __device__ __forceinline__ void begin_copy(int slot) {
    if (left_ > 0) {
      const unsigned to = ring_ + slot * kStage + put_, along = share_.unit(unit_) * (kUnit / 8);
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (inside_ >> (r * 4 + i) & 1) copy_16_bytes(to + r * kPiece + i * 512, weight_ + (source_[r][i] + along));
      --left_;
      if (++unit_ == share_.count) begin_pass(next_pass_);
    }
    end_copy_group();
  }

  const Outputs outputs_;
  const Share share_;
  const uint4* weight_;
  int row_;  // length of a row, in pieces of 16 bytes
  unsigned ring_, put_, get_;
  unsigned source_[kTiles][4], inside_;
  int per_pass_, next_pass_, unit_, left_, early_, slot_ = 0;
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
  __device__ __forceinline__ void load_staged(unsigned x, int row_bytes, int rows, int unit) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        values[n][h] = n * 8 + g < rows ? load_shared(x + (n * 8 + g) * row_bytes + unit * (kUnit * 2) + h * 64 + t * 16)
                                        : uint4{0, 0, 0, 0};
  }
};

template <typename T, int kTiles, int kColumns>
__device__ __forceinline__ void multiply(float (&sums)[kTiles][kColumns][4], const WeightFragments<kTiles>& w,
                                         const XFragments<kColumns>& x) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const uint4 low = w[r][h][0], high = w[r][h][1], b = x.values[n][h];
        multiply(sums[r][n], low.x, high.x, low.y, high.y, b.x, b.y, T{});
        multiply(sums[r][n], low.z, high.z, low.w, high.w, b.z, b.w, T{});
      }
}

// Brings the rows of x into shared memory.
template <typename T, int kThreads>
__device__ __forceinline__ void copy_rows(const SkinnyLinear& p, char* staged, int row_bytes) {
  using V = Vector<T>;
  constexpr int kAtOnce = 6;
  const int vectors = p.size / V::kSize, all = vectors * p.rows;
  for (int base = threadIdx.x; base < all; base += kAtOnce * kThreads) {
    V values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = base + i * kThreads, m = at / vectors;
      if (at < all) values[i] = V::load(static_cast<const T*>(p.x) + m * p.x_stride + (at - m * vectors) * V::kSize);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = base + i * kThreads, m = at / vectors;
      if (at < all) values[i].store(reinterpret_cast<T*>(staged + m * row_bytes) + (at - m * vectors) * V::kSize);
    }
  }
  __syncthreads();
}

// Norms the rows of x into shared memory: all of them at once, each by an equal share of the threads, which hold it in
// registers. Every block does it for itself; block 0 writes x + residual.
template <typename T, int kThreads, int kVectors>
class RowNorm {
 public:
  // The norm's weight, which depends on nothing.
  __device__ __forceinline__ explicit RowNorm(const SkinnyLinear& p) : shares_(p.rows == 1 ? 1 : p.rows == 2 ? 2 : 4) {
    threads_ = kThreads / shares_;
    row_ = threadIdx.x / threads_;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (place(v) >= p.size) continue;
      const T* weight = static_cast<const T*>(p.norm_weight) + place(v);
      if constexpr (kHold)
        weight_[v] = V::load(weight);
      else
        prefetch_line(weight);
    }
  }

  __device__ __forceinline__ void run(const SkinnyLinear& p, char* staged, int row_bytes, float* scratch) const {
    V h[kVectors];
    if (row_ < p.rows) load(p, h);
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (row_ < p.rows && place(v) < p.size)
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) squares += to_float(h[v].values[i]) * to_float(h[v].values[i]);
    squares = warp_sum(squares);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = squares;
    __syncthreads();
    if (row_ < p.rows) {
      float total = 0.0f;
      for (int w = 0; w < threads_ / kWarp; ++w) total += scratch[row_ * (threads_ / kWarp) + w];
      const float scale = rsqrtf(total / p.size + p.eps);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (place(v) >= p.size) continue;
        V w;
        if constexpr (kHold)
          w = weight_[v];
        else
          w = V::load(static_cast<const T*>(p.norm_weight) + place(v));
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) h[v].values[i] = from_float<T>(to_float(h[v].values[i]) * scale * to_float(w.values[i]));
        h[v].store(reinterpret_cast<T*>(staged + row_ * row_bytes) + place(v));
      }
    }
    __syncthreads();
  }

 private:
  using V = Vector<T>;
  static constexpr bool kHold = kVectors <= 4;  // else registers would not suffice

  __device__ __forceinline__ int place(int v) const { return (v * threads_ + threadIdx.x % threads_) * V::kSize; }

  __device__ __forceinline__ void load(const SkinnyLinear& p, V (&h)[kVectors]) const {
    const T *x = static_cast<const T*>(p.x) + row_ * p.x_stride, *residual = static_cast<const T*>(p.residual);
    V r[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (place(v) >= p.size) continue;
      h[v] = V::load(x + place(v));
      if (residual != nullptr) r[v] = V::load(residual + row_ * p.residual_stride + place(v));
    }
    if (residual == nullptr) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (place(v) >= p.size) continue;
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) h[v].values[i] = from_float<T>(to_float(h[v].values[i]) + to_float(r[v].values[i]));
      if (blockIdx.x == 0) h[v].store(static_cast<T*>(p.residual_out) + int64_t(row_) * p.size + place(v));
    }
  }

  int shares_, threads_, row_;
  V weight_[kHold ? kVectors : 1];
};

}  // namespace batchinfer
