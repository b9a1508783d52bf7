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

__device__ __forceinline__ uint4 load_shared(unsigned from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(unsigned to, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
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

// A warp's share of the contraction index: every kWarps-th unit. Blocks begin at different ones and go round, so that they do
// not all ask for the same piece of x at once.
struct Share {
  int first, step, count, start;

  __device__ __forceinline__ Share(int warp, int warps, int size)
      : first(warp), step(warps), count((size / kUnit - warp + warps - 1) / warps), start(count > 0 ? blockIdx.x * 5 % count : 0) {}
  // The unit at place i < count of the order.
  __device__ __forceinline__ int unit(int i) const {
    i += start;
    return first + (i < count ? i : i - count) * step;
  }
};

// Fragments of kTiles tiles and one unit: [tile][half of the unit][rows g, rows g + 8].
template <int kTiles>
using WeightFragments = uint4[kTiles][2][2];

// Fragments of x: [8 rows each][half of the unit].
template <int kColumns>
using XFragments = uint4[kColumns][2];

// The ring of one warp: kDepth stages of one unit each, of kTiles tiles and (with kColumns > 0) of up to 8 * kColumns rows of x.
// All stages are on their way, except while one is taken.
template <int kTiles, int kDepth, int kColumns>
class Ring {
 public:
  __host__ __device__ static constexpr int stage_bytes(int rows) { return kTiles * kPiece + (kColumns > 0 ? rows * kUnit * 2 : 0); }

  // Begins to read weights, but not x: no kernel writes weights.
  __device__ __forceinline__ Ring(const SkinnyLinear& p, const Outputs& outputs, const Share& share, unsigned ring)
      : outputs_(outputs),
        share_(share),
        weight_(static_cast<const uint4*>(p.weight)),
        row_(p.size / 8),
        x_(static_cast<const uint4*>(p.x)),
        x_row_(p.x_stride / 8),
        rows_(p.rows),
        ring_(ring),
        stage_(stage_bytes(p.rows)),
        per_pass_(outputs.per_pass<kTiles>()),
        left_(share.count * outputs.passes<kTiles>()) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    // 8 lanes copy a row; odd rows have their halves exchanged, for the banks' sake.
    put_ = lane / 8 * 128 + ((lane % 8) ^ (lane / 8 % 2 * 4)) * 16;
    get_ = g * 128 + (t ^ (g % 2 * 4)) * 16;
    x_ += lane / 8 * x_row_ + lane % 8;
    begin_pass(outputs.first);
    for (int i = 0; i < kDepth; ++i) {
      begin_copy<false>(ring_ + i * stage_);
      end_copy_group();
    }
  }

  // Brings the x of the first stages, whose weights are already on their way, past the queue of copies.
  __device__ __forceinline__ void begin_x() {
    const int lane = threadIdx.x % kWarp;
    uint4 values[kDepth][kColumns * 2];
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
#pragma unroll
      for (int j = 0; j < kColumns * 2; ++j)
        if (share_.count > 0 && j * 4 + lane / 8 < rows_)
          values[i][j] = x_[j * 4 * x_row_ + share_.unit(i % share_.count) * (kUnit / 8)];
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
#pragma unroll
      for (int j = 0; j < kColumns * 2; ++j)
        if (share_.count > 0 && j * 4 + lane / 8 < rows_)
          store_shared(ring_ + i * stage_ + kTiles * kPiece + j * 512 + put_, values[i][j]);
  }

  // The next stage, once it is there; the copy that takes its place begins. With kColumns 0 it has no x, and nothing becomes of x.
  template <typename X>
  __device__ __forceinline__ void take(WeightFragments<kTiles>& w, X& x) {
    wait_for_copy_groups<kDepth - 1>();
    __syncwarp();
    const unsigned stage = ring_ + slot_ * stage_;
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
          w[r][h][upper] = load_shared(stage + r * kPiece + upper * 1024 + (get_ ^ (h * 64)));
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) x[n][h] = load_shared(stage + kTiles * kPiece + n * 1024 + (get_ ^ (h * 64)));
    __syncwarp();
    begin_copy<true>(stage);
    end_copy_group();
    slot_ = slot_ + 1 == kDepth ? 0 : slot_ + 1;
  }

 private:
  __device__ __forceinline__ void begin_pass(int output) {
    const int lane = threadIdx.x % kWarp, end = min(outputs_.end, output + per_pass_);
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

  template <bool kWithX>
  __device__ __forceinline__ void begin_copy(unsigned stage) {
    if (left_ == 0) return;
    const int lane = threadIdx.x % kWarp, along = share_.unit(unit_) * (kUnit / 8);
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (inside_ >> (r * 4 + i) & 1) copy_16_bytes(stage + r * kPiece + i * 512 + put_, weight_ + (source_[r][i] + unsigned(along)));
    if constexpr (kWithX)
#pragma unroll
      for (int j = 0; j < kColumns * 2; ++j)
        if (j * 4 + lane / 8 < rows_) copy_16_bytes(stage + kTiles * kPiece + j * 512 + put_, x_ + (j * 4 * x_row_ + along));
    --left_;
    if (++unit_ == share_.count) begin_pass(next_pass_);
  }

  const Outputs outputs_;
  const Share share_;
  const uint4* weight_;
  int row_;  // length of a row of weights, in pieces of 16 bytes; so is the next one, of x
  const uint4* x_;
  int64_t x_row_;
  int rows_;
  unsigned ring_, put_, get_, stage_;
  unsigned source_[kTiles][4], inside_;  // in pieces of 16 bytes; which of them are this block's
  int per_pass_, next_pass_, unit_, left_, slot_ = 0;
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
        const uint4 low = w[r][h][0], high = w[r][h][1], b = x[n][h];
        multiply(sums[r][n], low.x, high.x, low.y, high.y, b.x, b.y, T{});
        multiply(sums[r][n], low.z, high.z, low.w, high.w, b.z, b.w, T{});
      }
}

// Norms the rows of x into shared memory: all of them at once, each by an equal share of the threads, which hold it in
// registers. Every block does it for itself; block 0 writes x + residual.
template <typename T, int kThreads, int kVectors>
class RowNorm {
 public:
  // Loads the norm's weight, which no kernel writes.
  __device__ __forceinline__ explicit RowNorm(const SkinnyLinear& p) : threads_(kThreads / p.rows), row_(threadIdx.x / threads_) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (place(v) < p.size) weight_[v] = V::load(static_cast<const T*>(p.norm_weight) + place(v));
  }

  __device__ __forceinline__ void run(const SkinnyLinear& p, unsigned normed, int row_bytes, float* scratch) const {
    V h[kVectors];
    load(p, h);
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (place(v) < p.size)
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) squares += to_float(h[v].values[i]) * to_float(h[v].values[i]);
    squares = warp_sum(squares);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = squares;
    __syncthreads();
    float total = 0.0f;
    for (int w = 0; w < threads_ / kWarp; ++w) total += scratch[row_ * (threads_ / kWarp) + w];
    const float scale = rsqrtf(total / p.size + p.eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (place(v) >= p.size) continue;
#pragma unroll
      for (int i = 0; i < V::kSize; ++i)
        h[v].values[i] = from_float<T>(to_float(h[v].values[i]) * scale * to_float(weight_[v].values[i]));
      store_shared(normed + row_ * row_bytes + place(v) * sizeof(T), *reinterpret_cast<const uint4*>(h[v].values));
    }
    __syncthreads();
  }

 private:
  using V = Vector<T>;

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

  int threads_, row_;
  V weight_[kVectors];
};

// Fragments of normed x.
template <int kColumns>
__device__ __forceinline__ void load_normed(XFragments<kColumns>& x, unsigned normed, int row_bytes, int rows, int unit) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      x[n][h] = n * 8 + g < rows ? load_shared(normed + (n * 8 + g) * row_bytes + unit * (kUnit * 2) + h * 64 + t * 16)
                                 : uint4{0, 0, 0, 0};
}

}  // namespace batchinfer
