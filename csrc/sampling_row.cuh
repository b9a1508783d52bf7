// A row of logits shared by the blocks of a cluster: reading it, and telling each other sums and maxima.
//
// Every block pushes its part into the shared memory of all blocks and then reads its own only, so a single cluster barrier
// suffices, and nobody reads from a block that has ended. Before Hopper there are no clusters, and a row has one block.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace batchinfer {

using Wide = unsigned long long;

constexpr int kSampleThreads = 512;
constexpr int kSampleWarps = kSampleThreads / kWarp;
constexpr int kMaxSplits = 8;
constexpr int kBins = 8;
constexpr int kParts = 16;  // numbers told at once: sums for the bins, two maxima, and room

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// 16 bytes of logits as they lie in registers. (As an array of 16-bit elements each would take a register of its own.)
template <typename T>
struct Packed {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];

  __device__ __forceinline__ static Packed load(const T* from) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
  }

  // `count` elements, then -inf.
  __device__ __noinline__ static Packed load_part(const T* from, int count) {
    Packed v = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const T x = i < count ? from[i] : from_float<T>(-INFINITY);
      if constexpr (sizeof(T) == 4)
        v.words[i] = __float_as_uint(x);
      else
        v.words[i / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(&x)) << (i % 2 * 16);
    }
    return v;
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    const uint32_t word = words[i / 2];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word)));
  }

  // NaN if one is.
  __device__ __forceinline__ float highest() const {
    if constexpr (sizeof(T) == 4) return max_or_nan(max_or_nan((*this)[0], (*this)[1]), max_or_nan((*this)[2], (*this)[3]));
    const Packed pair = {{pairwise(pairwise(words[0], words[1]), pairwise(words[2], words[3])), 0, 0, 0}};
    return max_or_nan(pair[0], pair[1]);
  }

 private:
  __device__ __forceinline__ static uint32_t pairwise(uint32_t a, uint32_t b) {
    uint32_t m;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    else
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
  }
};

// The tokens [begin, end) of a row: what one block looks at. `begin` is a multiple of a vector.
template <typename T>
struct Slice {
  static constexpr int kSize = Packed<T>::kSize, kStep = kSampleThreads * kSize;
  const T* row;
  int begin, end, size;  // size: of the whole row
  bool aligned;  // the row begins on 16 bytes

  // Tokens from `first` on; -inf stands for those beyond the end.
  __device__ __forceinline__ Packed<T> load(int first) const {
    if (aligned && first + kSize <= end) return Packed<T>::load(row + first);
    return Packed<T>::load_part(row + first, end - first);
  }

  // Where the first and the last vector of this thread begin; it takes every kStep-th token's. Before `begin` if it has none.
  __device__ __forceinline__ int first_of_thread() const { return begin + int(threadIdx.x) * kSize; }
  __device__ __forceinline__ int last_of_thread() const {
    const int first = first_of_thread();
    return first + (end - 1 - first + kStep) / kStep * kStep - kStep;
  }
};

template <typename T>
__device__ __forceinline__ Slice<T> slice_of(const T* logits, int64_t stride, int size, int row, int split, int splits) {
  constexpr int kSize = Packed<T>::kSize;
  const int share = (size + splits * kSize - 1) / (splits * kSize) * kSize;
  const T* begin = logits + row * stride;
  return {begin, min(split * share, size), min((split + 1) * share, size), size, reinterpret_cast<uintptr_t>(begin) % 16 == 0};
}

// (logit - highest) / temperature. The quotient is mended by what it misses (Markstein 1990), which rounds as a division does.
struct Scores {
  float max, heat, inverse;  // inverse: 1 / heat

  __device__ __forceinline__ float operator()(float logit) const {
    const float gap = logit - max, quotient = gap * inverse;
    return quotient == -INFINITY ? quotient : fmaf(fmaf(-quotient, heat, gap), inverse, quotient);
  }
};

// Float32 as unsigned integers of the same order, -0 beside 0; NaN is above all.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// A number and its token, so that the maximum is the highest number's, of equals the lowest token's. 0 is below all of them.
__device__ __forceinline__ Wide pack(float x, int token) { return Wide(ordered(x)) << 32 | uint32_t(~token); }
__device__ __forceinline__ float packed_number(Wide key) { return from_ordered(uint32_t(key >> 32)); }
__device__ __forceinline__ int packed_token(Wide key) { return int(~uint32_t(key)); }

// The highest of a thread's logits with its token. kInFlight: loads of 16 bytes that are under way at once.
template <int kInFlight = 4, typename T>
__device__ __forceinline__ Wide highest_of_thread(const Slice<T>& slice) {
  float best = -INFINITY;
  Packed<T> held;
  int held_first = -1;
  for (int first = slice.first_of_thread(); first < slice.end; first += kInFlight * Slice<T>::kStep) {
    Packed<T> v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) v[i] = slice.load(first + i * Slice<T>::kStep);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const float m = v[i].highest();
      if (!(m <= best) && best == best) best = m, held = v[i], held_first = first + i * Slice<T>::kStep;
    }
  }
  if (held_first < 0) return slice.first_of_thread() < slice.end ? pack(-INFINITY, slice.first_of_thread()) : 0;
  int at = 0;
#pragma unroll
  for (int i = Slice<T>::kSize - 1; i >= 0; --i) {
    const float x = held[i];
    if (x == best || x != x) at = i;
  }
  return pack(best, held_first + at);
}

struct Exchange {
  Wide warps[kSampleWarps][kParts];
  Wide told[2][kMaxSplits][kParts];
};

class Cluster {
 public:
  __device__ Cluster(Exchange& memory, int rank, int size) : memory_(memory), rank_(rank), size_(size) {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
  }

  // Once, between the construction and the first exchange: the others' shared memory exists.
  __device__ void wait_for_all() const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
  }

  __device__ int rank() const { return rank_; }

  // The next free place of a list in block 0, whose length lies there in `length`, gets `key`.
  __device__ void append(uint32_t* length, Wide* list, Wide key) const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) {
      uint32_t place;
      asm volatile("atom.shared::cluster.add.u32 %0, [%1], 1;" : "=r"(place) : "r"(address_in(0, length)) : "memory");
      tell(0, list + place, key);
      return;
    }
#endif
    list[atomicAdd(length, 1u)] = key;
  }

  __device__ void barrier() const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) {
      asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

  // The highest `key` of the cluster's threads.
  __device__ Wide max(Wide key) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) key = larger(key, __shfl_xor_sync(kAllLanes, key, offset));
    return exchange(key, [](Wide a, Wide b) { return larger(a, b); });
  }

  // Lane i < 8 gets the sum of bins[i] over the cluster's threads, lanes 8 and 9 the maxima of `first` and `second`. Integers, so
  // nothing depends on their order.
  __device__ Wide sum(Wide (&bins)[kBins], uint32_t first = 0, uint32_t second = 0) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = kBins / 2; half > 0; half /= 2) {  // lanes halve what they hold: afterwards one bin each
      const bool upper = lane & half;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const Wide kept = upper ? bins[i + half] : bins[i], given = upper ? bins[i] : bins[i + half];
        bins[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
      }
    }
    Wide x = bins[0];
    x += __shfl_xor_sync(kAllLanes, x, 8);
    x += __shfl_xor_sync(kAllLanes, x, 16);
    first = __reduce_max_sync(kAllLanes, first), second = __reduce_max_sync(kAllLanes, second);
    if (lane >= kBins) x = lane == kBins ? first : lane == kBins + 1 ? second : 0;
    const bool adds = lane % kParts < kBins;
    return exchange(x, [adds](Wide a, Wide b) { return adds ? a + b : larger(a, b); });
  }

 private:
  __device__ static Wide larger(Wide a, Wide b) { return a > b ? a : b; }

  // `mine`: the warp's part l % 16 in lane l. Returns the same of the whole cluster. 0 is the operation's neutral element.
  template <typename Operation>
  __device__ Wide exchange(Wide mine, Operation operation) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = threadIdx.x % kParts;
    if (lane < kParts) memory_.warps[warp][lane] = mine;
    __syncthreads();
    if (int(threadIdx.x) < kParts * size_) {
      Wide x = 0;
#pragma unroll
      for (int i = 0; i < kSampleWarps; ++i) x = operation(x, memory_.warps[i][part]);
      tell(threadIdx.x / kParts, &memory_.told[turn_][rank_][part], x);
    }
    barrier();
    Wide x = 0;
    for (int rank = lane / kParts; rank < size_; rank += kWarp / kParts) x = operation(x, memory_.told[turn_][rank][part]);
    x = operation(x, __shfl_xor_sync(kAllLanes, x, kParts));
    turn_ ^= 1;  // who is ahead writes into the other half, and gets no further before all have read this one
    return x;
  }

  // *place = x in the shared memory of block `rank`.
  __device__ void tell(int rank, Wide* place, Wide x) const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) {
      asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address_in(rank, place)), "l"(x) : "memory");
      return;
    }
#endif
    *place = x;
  }

#if __CUDA_ARCH__ >= 900
  __device__ static uint32_t address_in(int rank, void* place) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(uint32_t(__cvta_generic_to_shared(place))), "r"(rank));
    return address;
  }
#endif

  Exchange& memory_;
  int rank_, size_, turn_ = 0;
};

}  // namespace batchinfer
