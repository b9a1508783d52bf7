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
#include "reduce_norm.cuh"

#include <algorithm>

#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kSlots = 3;

template <typename T, int kChunks, int kRanks>
__global__ void __launch_bounds__(kMaxThreads) push_kernel(const __grid_constant__ ReduceNorm norm, const __grid_constant__ Peers peers,
                                                           const int64_t slots) {
  __shared__ float scratch[kWarp];
  Words* words = reinterpret_cast<Words*>(peers.memory[peers.rank] + PeerLayout::kWords);
  const int row_bytes = norm.size * sizeof(T);
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
      if (chunk_at(i) >= row_bytes) continue;
      const int64_t offset = static_cast<int64_t>(row) * row_bytes + chunk_at(i);
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
    const auto at = [&](int i) { return chunk_at(i) < row_bytes ? static_cast<int64_t>(row) * row_bytes + chunk_at(i) : -1; };
    int4 residual[kChunks];
    load_residual(norm, at, residual);
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
    sums.norm(norm, at, residual, weight, scratch, y);
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
                                                            const int64_t shares, const int64_t y_at) {
  __shared__ float scratch[kWarp];
  char* own = peers.memory[peers.rank];
  Words* words = reinterpret_cast<Words*>(own + PeerLayout::kWords);
  const int row_bytes = norm.size * sizeof(T), part = part_of(norm.rows, kRanks);
  const auto share = [&](int row) { return shares + (static_cast<int64_t>(peers.rank) * part + row) * row_bytes; };
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
    for (int row = blockIdx.x; row < rows_of_part(norm.rows, kRanks, to); row += gridDim.x)
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        if (chunk_at(i) < row_bytes)
          store16(peers.memory[to], share(row) + chunk_at(i),
                  load16(norm.x, static_cast<int64_t>(to * part + row) * row_bytes + chunk_at(i)));
  }
  exchange(0);
  norm_part<T, kChunks, kRanks>(norm, own + shares, peers.rank, weight, scratch, [&](int64_t at, int4 y) {
#pragma unroll
    for (int step = 0; step < kRanks; ++step) store16(peers.memory[(peers.rank + step) % kRanks], y_at + at, y);
  });
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

// How many run at once: blocks that wait for those of other ranks must not wait for each other's place.
template <auto kKernel>
int resident_blocks(unsigned threads) {
  static int known[kMaxThreads / kWarp + 1];  // by warps; 0: not asked yet
  int& blocks = known[threads / kWarp];
  if (blocks == 0) check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, 0), "reduce_norm");
  return blocks * num_multiprocessors();
}

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
      constexpr auto kernel = push_kernel<T, kChunks, kRanks>;
      const dim3 threads = threads_for(chunks, kChunks);
      const int blocks = std::min(norm.rows, resident_blocks<kernel>(threads.x));
      launch("push_reduce_norm", kernel, dim3(blocks), threads, 0, stream, norm, peers, layout.slots);
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
      constexpr auto kernel = split_kernel<T, kChunks, kRanks>;
      const dim3 threads = threads_for(chunks, kChunks);
      const int most = std::min({resident_blocks<kernel>(threads.x), max_blocks, kMaxReduceBlocks});
      launch("split_reduce_norm", kernel, dim3(std::min(part_of(norm.rows, kRanks), most)), threads, 0, stream, norm, peers,
             layout.shares, layout.y);
    });
  });
}

void peer_memory_clear(char* memory, int64_t bytes, cudaStream_t stream) {
  const int64_t begin = PeerLayout(2, 0, 0, 0).slots / 16;
  clear_kernel<<<num_multiprocessors() * 4, 256, 0, stream>>>(reinterpret_cast<int4*>(memory), begin, bytes / 16);
  check(cudaGetLastError(), "peer_memory_clear");
}

}  // namespace batchinfer
