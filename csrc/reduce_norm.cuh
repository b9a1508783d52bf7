// What the kernels that sum over ranks share: 16-byte accesses to other GPUs' memory, flags, a row's sum with its norm.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/device.cuh"
#include "reduce_norm.h"

namespace batchinfer {

constexpr int kMaxThreads = 1024;

// Rows of a rank's part, and those that it really has: the last parts may be short.
__host__ __device__ inline int part_of(int rows, int ranks) { return (rows + ranks - 1) / ranks; }
__host__ __device__ inline int rows_of_part(int rows, int ranks, int rank) {
  const int part = part_of(rows, ranks), left = rows - rank * part;
  return left < 0 ? 0 : left < part ? left : part;
}

struct Words {
  unsigned push_call, push_done, push_bytes, split_call, split_done;
};

__device__ __forceinline__ unsigned load_word(const unsigned* from) {
  unsigned word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

// 16 bytes that another GPU may write at any time: past the first cache, and each time anew.
__device__ __forceinline__ int4 load_arriving(const char* from) {
  int4 v;
  asm volatile("ld.volatile.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_remote(char* to, int4 v) {
  asm volatile("st.volatile.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void signal(unsigned* flag, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void wait_for(const unsigned* flag, unsigned value) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen != value);
}

// Two negative zeros of a half type; of float32 a number so near to zero (-4.6e-41) that it may be sent as zero.
constexpr int kNothing = static_cast<int>(0x80008000u);

template <typename T>
__device__ __forceinline__ int without_nothing(int word) {
  if constexpr (sizeof(T) == 4) return word == kNothing ? 0 : word;
  return word & ~(static_cast<int>(__vcmpeq2(word, kNothing)) & kNothing);
}

template <typename T>
__device__ __forceinline__ int4 sendable(int4 v) {
  return make_int4(without_nothing<T>(v.x), without_nothing<T>(v.y), without_nothing<T>(v.z), without_nothing<T>(v.w));
}

__device__ __forceinline__ bool has_arrived(int4 v) {
  return v.x != kNothing && v.y != kNothing && v.z != kNothing && v.w != kNothing;
}

template <typename T>
__device__ __forceinline__ Vector<T> as_vector(int4 v) {
  Vector<T> out;
  *reinterpret_cast<int4*>(out.values) = v;
  return out;
}

__device__ __forceinline__ int4 load16(const void* base, int64_t offset) {
  return *reinterpret_cast<const int4*>(static_cast<const char*>(base) + offset);
}

__device__ __forceinline__ void store16(void* base, int64_t offset, int4 v) {
  *reinterpret_cast<int4*>(static_cast<char*>(base) + offset) = v;
}

// A row's chunks of one thread, summed: adds the residual, stores the new one, and norms. All threads of the block take part.
template <typename T, int kChunks>
struct Row {
  using V = Vector<T>;
  float sum[kChunks][V::kSize];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
#pragma unroll
      for (int j = 0; j < V::kSize; ++j) sum[i][j] = 0.0f;
  }

  __device__ __forceinline__ void add(int i, int4 chunk) {
    const V v = as_vector<T>(chunk);
#pragma unroll
    for (int j = 0; j < V::kSize; ++j) sum[i][j] += to_float(v.values[j]);
  }

  // The normed chunks. `at(i)`: byte offset of chunk i in the tensors, negative beyond the row. `residual`: its chunks.
  template <typename At>
  __device__ __forceinline__ void norm(const ReduceNorm& norm, At at, const int4 (&residual)[kChunks],
                                       const V (&weight)[kChunks], float* scratch, V (&y)[kChunks]) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (at(i) < 0) continue;
      add(i, residual[i]);
      V total;
#pragma unroll
      for (int j = 0; j < V::kSize; ++j) {
        total.values[j] = from_float<T>(sum[i][j]);
        sum[i][j] = to_float(total.values[j]);
        squares += sum[i][j] * sum[i][j];
      }
      total.store(reinterpret_cast<T*>(static_cast<char*>(norm.total) + at(i)));
    }
    const float factor = rsqrtf(block_sum(squares, scratch) / norm.size + norm.eps);
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
#pragma unroll
      for (int j = 0; j < V::kSize; ++j) y[i].values[j] = from_float<T>(sum[i][j] * factor * to_float(weight[i].values[j]));
    __syncthreads();  // scratch is used again
  }
};

// The byte in a row where the i-th chunk of this thread begins.
__device__ __forceinline__ int chunk_at(int i) { return static_cast<int>(threadIdx.x + i * blockDim.x) * 16; }

// Before the summands have arrived: both then come at the same time. Zeros where there is no residual.
template <int kChunks, typename At>
__device__ __forceinline__ void load_residual(const ReduceNorm& norm, At at, int4 (&residual)[kChunks]) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    residual[i] = norm.residual != nullptr && at(i) >= 0 ? load16(norm.residual, at(i)) : make_int4(0, 0, 0, 0);
}

template <typename T, int kChunks>
__device__ __forceinline__ void load_weight(const ReduceNorm& norm, Vector<T> (&weight)[kChunks]) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (threadIdx.x + i * blockDim.x) * Vector<T>::kSize;
    weight[i] = column < norm.size ? Vector<T>::load(static_cast<const T*>(norm.weight) + column) : Vector<T>{};
  }
}

// Sums and norms this rank's part of the rows, whose other summands lie in its memory from `shares` on. `store(offset, y)` takes
// 16 bytes of a normed row at their offset in the tensors.
template <typename T, int kChunks, int kRanks, typename Store>
__device__ __forceinline__ void norm_part(const ReduceNorm& norm, const char* shares, int rank, const Vector<T> (&weight)[kChunks],
                                          float* scratch, Store store) {
  const int row_bytes = norm.size * sizeof(T), part = part_of(norm.rows, kRanks);
  const int rows = rows_of_part(norm.rows, kRanks, rank);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t whole = static_cast<int64_t>(rank * part + row) * row_bytes;
    const auto at = [&](int i) { return chunk_at(i) < row_bytes ? whole + chunk_at(i) : -1; };
    int4 residual[kChunks];
    load_residual(norm, at, residual);
    Row<T, kChunks> sums;
    sums.clear();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (at(i) < 0) continue;
#pragma unroll
      for (int source = 0; source < kRanks; ++source) {
        const char* share = shares + (static_cast<int64_t>(source) * part + row) * row_bytes + chunk_at(i);
        sums.add(i, source == rank ? load16(norm.x, at(i)) : load_arriving(share));
      }
    }
    Vector<T> y[kChunks];
    sums.norm(norm, at, residual, weight, scratch, y);
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (at(i) >= 0) store(at(i), *reinterpret_cast<const int4*>(y[i].values));
  }
}

// Calls `body` with the number of chunks that a thread has, and of ranks.
template <typename Body>
void dispatch_sizes(int chunks, int ranks, Body&& body) {
  const auto with_ranks = [&](auto per_thread) {
    switch (ranks) {
      case 2: return body(per_thread, std::integral_constant<int, 2>{});
      case 4: return body(per_thread, std::integral_constant<int, 4>{});
      case 8: return body(per_thread, std::integral_constant<int, 8>{});
    }
    throw std::invalid_argument("reduce_norm: there must be 2, 4 or 8 ranks");
  };
  if (chunks <= kMaxThreads) return with_ranks(std::integral_constant<int, 1>{});
  if (chunks <= 2 * kMaxThreads) return with_ranks(std::integral_constant<int, 2>{});
  throw std::invalid_argument("reduce_norm: rows are too long");
}

inline dim3 threads_for(int chunks, int per_thread) { return dim3((chunks + per_thread * kWarp - 1) / (per_thread * kWarp) * kWarp); }

}  // namespace batchinfer
