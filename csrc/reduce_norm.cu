// Sum over ranks, residual add and RMSNorm. Bound by the latency of the link for few rows, by its rate for many.
//
// Ranks write into each other's memory (they never read it: a write crosses the link once, a read twice). Two ways:
//
// *Push*: everybody sends all of its rows to all others, who wait for the data itself. Memory that nothing has arrived in holds
// negative zeros, which nobody sends; so no flag follows the data and no fence waits for it (the idea is that of Lamport's
// single-writer buffers, as used in the all-reduce of TensorRT-LLM). There are three slots: a call waits in one, and empties the
// one of the call before. The peers' next writes to that come two calls later, when they have had this rank's data of the next
// call, and so know that this one is over.
//
// *Split*: each rank gets the summands of its part of the rows, sums and norms them, and sends the result to all. Flags, one for a
// block of a rank, carry the number of the call. Block b only ever waits for block b of other ranks.
//
// Ranks sum in the same order, or one sums for all: the result is the same to the bit everywhere. Numbers of calls are kept on
// the device, so graphs can be captured in one order and replayed in any other that is the same on every rank.
#include "reduce_norm.h"

#include <algorithm>
#include <stdexcept>

#include "common/device.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kMaxThreads = 1024, kSlots = 3;

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

  // The normed chunks. `at(i)`: byte offset of chunk i in the tensors, negative beyond the row.
  template <typename At>
  __device__ __forceinline__ void norm(const ReduceNorm& norm, At at, const V (&weight)[kChunks], float* scratch,
                                       V (&y)[kChunks]) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (at(i) < 0) continue;
      if (norm.residual != nullptr) add(i, load16(norm.residual, at(i)));
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

template <typename T, int kChunks>
__device__ __forceinline__ void load_weight(const ReduceNorm& norm, Vector<T> (&weight)[kChunks]) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (threadIdx.x + i * blockDim.x) * Vector<T>::kSize;
    weight[i] = column < norm.size ? Vector<T>::load(static_cast<const T*>(norm.weight) + column) : Vector<T>{};
  }
}

template <typename T, int kChunks, int kRanks>
__global__ void __launch_bounds__(kMaxThreads) push_kernel(const __grid_constant__ ReduceNorm norm, const __grid_constant__ Peers peers,
                                                           const int64_t slots) {
  __shared__ float scratch[kWarp];
  Words* words = reinterpret_cast<Words*>(peers.memory[peers.rank] + PeerLayout::kWords);
  const int row_bytes = norm.size * sizeof(T);
  const auto chunk = [&](int i) { return static_cast<int>(threadIdx.x + i * blockDim.x) * 16; };
  Vector<T> weight[kChunks];
  load_weight<T, kChunks>(norm, weight);
  wait_for_previous();
  let_next_start();
  const unsigned call = load_word(&words->push_call), bytes_before = load_word(&words->push_bytes);
  const auto slot = [&](unsigned of_call, int source) {
    return slots + (static_cast<int64_t>(of_call % kSlots) * kRanks + source) * peers.push_capacity;
  };

  for (int row = blockIdx.x; row < norm.rows; row += gridDim.x)
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (chunk(i) >= row_bytes) continue;
      const int64_t offset = static_cast<int64_t>(row) * row_bytes + chunk(i);
      const int4 v = sendable<T>(load16(norm.x, offset));
#pragma unroll
      for (int step = 1; step < kRanks; ++step)  // each rank begins with another peer
        store_remote(peers.memory[(peers.rank + step) % kRanks] + slot(call, peers.rank) + offset, v);
    }

  for (int step = 1; step < kRanks; ++step) {
    char* before = peers.memory[peers.rank] + slot(call + kSlots - 1, (peers.rank + step) % kRanks);
    for (int64_t at = 16 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x); at < bytes_before;
         at += 16 * static_cast<int64_t>(gridDim.x) * blockDim.x)
      *reinterpret_cast<int4*>(before + at) = make_int4(kNothing, kNothing, kNothing, kNothing);
  }

  for (int row = blockIdx.x; row < norm.rows; row += gridDim.x) {
    const auto at = [&](int i) { return chunk(i) < row_bytes ? static_cast<int64_t>(row) * row_bytes + chunk(i) : -1; };
    Row<T, kChunks> sums;
    sums.clear();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (at(i) < 0) continue;
      int4 received[kRanks];
      bool complete;
      do {
        complete = true;
#pragma unroll
        for (int source = 0; source < kRanks; ++source) {
          received[source] = source == peers.rank ? sendable<T>(load16(norm.x, at(i)))
                                                  : load_arriving(peers.memory[peers.rank] + slot(call, source) + at(i));
          complete = complete && (source == peers.rank || has_arrived(received[source]));
        }
      } while (!complete);
#pragma unroll
      for (int source = 0; source < kRanks; ++source) sums.add(i, received[source]);
    }
    Vector<T> y[kChunks];
    sums.norm(norm, at, weight, scratch, y);
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (at(i) >= 0) y[i].store(reinterpret_cast<T*>(static_cast<char*>(norm.y) + at(i)));
  }

  if (threadIdx.x == 0 && atomicAdd(&words->push_done, 1) == gridDim.x - 1) {  // every block has read the words
    words->push_done = 0;
    words->push_bytes = static_cast<unsigned>(norm.rows) * row_bytes;
    words->push_call = call + 1;
  }
}

template <typename T, int kChunks, int kRanks>
__global__ void __launch_bounds__(kMaxThreads) split_kernel(const __grid_constant__ ReduceNorm norm, const __grid_constant__ Peers peers,
                                                            const int64_t shares) {
  __shared__ float scratch[kWarp];
  char* own = peers.memory[peers.rank];
  const int64_t y_at = static_cast<char*>(norm.y) - own;  // the same on every rank
  Words* words = reinterpret_cast<Words*>(own + PeerLayout::kWords);
  const int row_bytes = norm.size * sizeof(T), part = (norm.rows + kRanks - 1) / kRanks;  // rows of a rank; the last may have fewer
  const auto chunk = [&](int i) { return static_cast<int>(threadIdx.x + i * blockDim.x) * 16; };
  const auto rows_of = [&](int rank) { return max(0, min(part, norm.rows - rank * part)); };
  const auto share = [&](int source, int row) { return shares + (static_cast<int64_t>(source) * part + row) * row_bytes; };
  const auto flag = [&](int reader, int stage, int writer) {
    return reinterpret_cast<unsigned*>(peers.memory[reader] + PeerLayout::kFlags) +
           (stage * kMaxRanks + writer) * kMaxReduceBlocks + blockIdx.x;
  };
  Vector<T> weight[kChunks];
  load_weight<T, kChunks>(norm, weight);
  wait_for_previous();
  let_next_start();
  const unsigned call = load_word(&words->split_call) + 1;  // flags begin as 0
  const auto exchange = [&](int stage) {  // what this block wrote is there for block blockIdx.x of every rank, and theirs here
    __syncthreads();
    if (threadIdx.x < kRanks && threadIdx.x != peers.rank) {
      signal(flag(threadIdx.x, stage, peers.rank), call);
      wait_for(flag(peers.rank, stage, threadIdx.x), call);
    }
    __syncthreads();
  };

#pragma unroll
  for (int step = 1; step < kRanks; ++step) {
    const int to = (peers.rank + step) % kRanks;
    for (int row = blockIdx.x; row < rows_of(to); row += gridDim.x)
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        if (chunk(i) < row_bytes)
          store16(peers.memory[to], share(peers.rank, row) + chunk(i),
                  load16(norm.x, static_cast<int64_t>(to * part + row) * row_bytes + chunk(i)));
  }
  exchange(0);
  for (int row = blockIdx.x; row < rows_of(peers.rank); row += gridDim.x) {
    const int64_t whole = static_cast<int64_t>(peers.rank * part + row) * row_bytes;
    const auto at = [&](int i) { return chunk(i) < row_bytes ? whole + chunk(i) : -1; };
    Row<T, kChunks> sums;
    sums.clear();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (at(i) < 0) continue;
#pragma unroll
      for (int source = 0; source < kRanks; ++source)
        sums.add(i, source == peers.rank ? load16(norm.x, at(i)) : load_arriving(own + share(source, row) + chunk(i)));
    }
    Vector<T> y[kChunks];
    sums.norm(norm, at, weight, scratch, y);
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (at(i) >= 0)
#pragma unroll
        for (int step = 0; step < kRanks; ++step)
          store16(peers.memory[(peers.rank + step) % kRanks], y_at + at(i), *reinterpret_cast<const int4*>(y[i].values));
  }
  exchange(1);

  if (threadIdx.x == 0 && atomicAdd(&words->split_done, 1) == gridDim.x - 1) {
    words->split_done = 0;
    words->split_call = call;
  }
}

__global__ void clear_kernel(int4* memory, int64_t begin, int64_t end) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    memory[i] = i < begin ? make_int4(0, 0, 0, 0) : make_int4(kNothing, kNothing, kNothing, kNothing);
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

dim3 threads_for(int chunks, int per_thread) { return dim3((chunks + per_thread * kWarp - 1) / (per_thread * kWarp) * kWarp); }

}  // namespace

PeerLayout::PeerLayout(int count, int64_t push_capacity, int64_t split_capacity, int64_t row_bytes) {
  slots = kFlags + 2 * kMaxRanks * kMaxReduceBlocks * sizeof(unsigned);
  shares = slots + kSlots * count * push_capacity;
  y = shares + split_capacity + count * row_bytes;  // parts are rounded up to whole rows
  bytes = y + split_capacity;
}

void push_reduce_norm(const ReduceNorm& norm, const Peers& peers, Dtype dtype, cudaStream_t stream) {
  if (norm.rows == 0) return;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int chunks = norm.size / Vector<T>::kSize;
    dispatch_sizes(chunks, peers.count, [&](auto per_thread, auto ranks) {
      constexpr int kChunks = decltype(per_thread)::value, kRanks = decltype(ranks)::value;
      const PeerLayout layout(kRanks, peers.push_capacity, peers.split_capacity, 0);
      const int blocks = std::min(norm.rows, num_multiprocessors());  // all of them run at once, since some wait for others
      launch("push_reduce_norm", push_kernel<T, kChunks, kRanks>, dim3(blocks), threads_for(chunks, kChunks), 0, stream, norm,
             peers, layout.slots);
    });
  });
}

void split_reduce_norm(const ReduceNorm& norm, const Peers& peers, int max_blocks, Dtype dtype, cudaStream_t stream) {
  if (norm.rows == 0) return;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int chunks = norm.size / Vector<T>::kSize;
    dispatch_sizes(chunks, peers.count, [&](auto per_thread, auto ranks) {
      constexpr int kChunks = decltype(per_thread)::value, kRanks = decltype(ranks)::value;
      const PeerLayout layout(kRanks, peers.push_capacity, peers.split_capacity, int64_t(norm.size) * sizeof(T));
      const int part = (norm.rows + kRanks - 1) / kRanks;
      const int blocks = std::min({part, num_multiprocessors(), max_blocks, kMaxReduceBlocks});
      launch("split_reduce_norm", split_kernel<T, kChunks, kRanks>, dim3(blocks), threads_for(chunks, kChunks), 0, stream, norm,
             peers, layout.shares);
    });
  });
}

void peer_memory_clear(char* memory, int64_t bytes, cudaStream_t stream) {
  const int64_t begin = PeerLayout(2, 0, 0, 0).slots / 16;
  clear_kernel<<<num_multiprocessors() * 4, 256, 0, stream>>>(reinterpret_cast<int4*>(memory), begin, bytes / 16);
  check(cudaGetLastError(), "peer_memory_clear");
}

}  // namespace batchinfer
