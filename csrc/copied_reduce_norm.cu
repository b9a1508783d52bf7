// Sum over ranks, residual add and norm, of which copy engines move the rows between GPUs.
//
// Products of many rows are persistent kernels that hold every multiprocessor to their end, so nothing that needs one runs
// beside them: the copies do. A flag is a copy of four bytes behind the data in the same stream, from a table of numbers. Between
// the copies one kernel waits for what the other ranks send, sums, and norms; at the end another waits for their normed rows.
#include <algorithm>

#include "common/launch.h"
#include "reduce_norm.cuh"

namespace batchinfer {
namespace {

__host__ __device__ int64_t copy_flag(int piece, int stage, int writer) {
  return PeerLayout::kCopyFlags + ((piece * 2 + stage) * kMaxRanks + writer) * sizeof(unsigned);
}

__device__ __forceinline__ void wait_for_ranks(const Peers& peers, int piece, int stage, unsigned number) {
  const int rank = threadIdx.x;
  if (rank < peers.count && rank != peers.rank)
    wait_for(reinterpret_cast<const unsigned*>(peers.memory[peers.rank] + copy_flag(piece, stage, rank)), number);
  __syncthreads();
}

template <typename T, int kChunks, int kRanks>
__global__ void __launch_bounds__(kMaxThreads) part_kernel(const __grid_constant__ ReduceNorm norm, const __grid_constant__ Peers peers,
                                                           const int64_t shares, int piece, unsigned number) {
  __shared__ float scratch[kWarp];
  Vector<T> weight[kChunks];
  load_weight<T, kChunks>(norm, weight);
  wait_for_previous();
  wait_for_ranks(peers, piece, 0, number);
  norm_part<T, kChunks, kRanks>(norm, peers.memory[peers.rank] + shares, peers.rank, weight, scratch,
                                [&](int64_t at, int4 y) { store16(norm.y, at, y); });
}

__global__ void await_kernel(const __grid_constant__ Peers peers, int piece, unsigned number) {
  wait_for_previous();
  wait_for_ranks(peers, piece, 1, number);
}

void copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (bytes > 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copied_reduce_norm");
}

}  // namespace

void copied_reduce_norm(const ReduceNorm& norm, const Peers& peers, int piece, int first_row, unsigned call, Dtype dtype,
                        cudaStream_t stream) {
  const int64_t row_bytes = norm.size * int64_t(dtype == Dtype::kFloat32 ? 4 : 2);
  const PeerLayout layout(peers.count, peers.push_capacity, peers.split_capacity, row_bytes);
  const int64_t shares = layout.shares + (first_row + piece * peers.count) * row_bytes;
  const int64_t part_bytes = part_of(norm.rows, peers.count) * row_bytes;
  const unsigned number = (call + 1) % kFlagNumbers;  // flags begin as 0
  char* own = peers.memory[peers.rank];
  const char* number_at = own + PeerLayout::kNumbers + number * sizeof(unsigned);
  const auto bytes_of = [&](int rank) { return rows_of_part(norm.rows, peers.count, rank) * row_bytes; };
  const auto to_all = [&](int stage, auto send) {
    for (int step = 1; step < peers.count; ++step) {
      const int to = (peers.rank + step) % peers.count;
      send(to);
      copy(peers.memory[to] + copy_flag(piece, stage, peers.rank), number_at, sizeof(unsigned), stream);
    }
  };

  to_all(0, [&](int to) {
    copy(peers.memory[to] + shares + peers.rank * part_bytes, static_cast<const char*>(norm.x) + to * part_bytes, bytes_of(to), stream);
  });
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int chunks = norm.size / Vector<T>::kSize, blocks = std::min(part_of(norm.rows, peers.count), num_multiprocessors());
    dispatch_sizes(chunks, peers.count, [&](auto per_thread, auto ranks) {
      constexpr int kChunks = decltype(per_thread)::value, kRanks = decltype(ranks)::value;
      launch("copied_reduce_norm", part_kernel<T, kChunks, kRanks>, dim3(blocks), threads_for(chunks, kChunks), 0, stream, norm,
             peers, shares, piece, number);
    });
  });
  const int64_t y_at = static_cast<char*>(norm.y) - own + peers.rank * part_bytes;  // the same place on every rank
  to_all(1, [&](int to) { copy(peers.memory[to] + y_at, own + y_at, bytes_of(peers.rank), stream); });
  launch("copied_reduce_norm", await_kernel, dim3(1), dim3(kWarp), 0, stream, peers, piece, number);
}

}  // namespace batchinfer
