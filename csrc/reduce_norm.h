// Sum over ranks, residual add and RMSNorm in one kernel: `ops.reduce_norm`. The ranks are GPUs that map each other's memory.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

constexpr int kMaxRanks = 8;
constexpr int kMaxReduceBlocks = 512;

// The memory that each rank gives to all, at the addresses where this rank sees it. All of it must be `peer_memory_clear`.
struct Peers {
  char* memory[kMaxRanks];
  int rank, count;        // count: 2, 4 or 8
  int64_t push_capacity;  // bytes of the largest x [rows, size] that is pushed
  int64_t split_capacity;  // bytes of the largest x that is split
};

// What lies where in that memory. Words are only this rank's own; flags, slots, shares and y are written by the others.
struct PeerLayout {
  static constexpr int64_t kWords = 0, kFlags = 4096;
  int64_t slots, shares, y, bytes;
  explicit PeerLayout(int count, int64_t push_capacity, int64_t split_capacity, int64_t row_bytes);
};

struct ReduceNorm {
  void* y;               // [rows, size], dense; for `split_reduce_norm` the y of the peer memory
  void* total;           // sum of all ranks' x, plus residual: [rows, size], dense; may be the memory of x or of residual
  const void* x;         // this rank's summand [rows, size], dense
  const void* residual;  // [rows, size], dense, or null
  const void* weight;    // [size]
  int rows, size;
  float eps;
};

// Every element is sent to every rank, and each rank sums and norms all rows: one way over the link. For few rows.
void push_reduce_norm(const ReduceNorm& norm, const Peers& peers, Dtype dtype, cudaStream_t stream);

// Each rank sums and norms its part of the rows, and sends the normed ones to all. `total` is valid only in those rows, which are
// the same in every call with as many rows; so is `residual` read. `max_blocks`: how much of the device to take.
void split_reduce_norm(const ReduceNorm& norm, const Peers& peers, int max_blocks, Dtype dtype, cudaStream_t stream);

// Makes memory of `bytes` ready for its first use.
void peer_memory_clear(char* memory, int64_t bytes, cudaStream_t stream);

}  // namespace batchinfer
