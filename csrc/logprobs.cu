// Log-softmax at chosen tokens and at the k likeliest ones, without storing that of any other. A row is read for its maximum, for
// the sum and the rank, and a few times more to find the likeliest (sampling_filter.cuh); from the L2 cache, if it has room.
#include "logprobs.h"

#include "sampling_filter.cuh"
#include "sampling_launch.h"

namespace batchinfer {
namespace {

struct Block {
  Exchange exchange;
  Columns columns;
  uint32_t length;
  Wide likeliest[kMostLikeliest];  // in block 0, in no order
};

constexpr float kUnits = 17592186044416.0f;  // 2^44: what exp(0) counts for in sums

struct Counted {
  float log_total;  // of exp(logit - max)
  int64_t rank;
};

// The sum is one of integers and hence the same however a row is shared.
template <typename T>
__device__ Counted count(const Slice<T>& slice, Cluster& cluster, float max, float score, int chosen) {
  Wide parts[kBins] = {};
  for (int token = slice.first_of_thread(); token < slice.end; token += Slice<T>::kStep) {
    const Packed<T> v = slice.load(token);
#pragma unroll
    for (int i = 0; i < Slice<T>::kSize; ++i) {
      const float x = v[i];
      parts[0] += __float2ull_rn(expf(x - max) * kUnits);
      parts[1] += token + i < slice.end && (x > score || (x == score && token + i < chosen)) ? 1 : 0;
    }
  }
  const Wide sum = cluster.sum(parts);
  const Wide mass = __shfl_sync(kAllLanes, sum, 0), before = __shfl_sync(kAllLanes, sum, 1);
  const float rest = static_cast<float>(static_cast<long long>(mass - Wide(kUnits))) / kUnits;
  return {isfinite(max) ? log1pf(rest) : NAN, int64_t(before) + 1};
}

// Every admitted token goes into block 0's list, which then puts each into its place: that many are before it.
template <typename T>
__device__ void tell_likeliest(const Slice<T>& slice, Cluster& cluster, Block& block, const Border& border, float max,
                               float log_total, int64_t* ids, float* logprobs, int k) {
  for (int token = slice.first_of_thread(); token < slice.end; token += Slice<T>::kStep) {
    const Packed<T> v = slice.load(token);
#pragma unroll
    for (int i = 0; i < Slice<T>::kSize; ++i)
      if (token + i < slice.end && border.admits(~ordered(v[i]), token + i))
        cluster.append(&block.length, block.likeliest, pack(v[i], token + i));
  }
  cluster.barrier();
  if (cluster.rank() != 0) return;
  for (int i = threadIdx.x; i < k; i += kSampleThreads) {
    const Wide key = block.likeliest[i];
    int before = 0;
    for (int j = 0; j < k; ++j) before += block.likeliest[j] > key;
    ids[before] = packed_token(key);
    logprobs[before] = packed_number(key) - max - log_total;
  }
}

__device__ void tell_nothing(const LogProbabilities& told, int64_t row, int k) {
  if (threadIdx.x == 0) told.chosen[row] = NAN, told.ranks[row] = 1;
  for (int i = threadIdx.x; i < k; i += kSampleThreads) told.top_ids[row * k + i] = i, told.top[row * k + i] = NAN;
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2)
    log_probabilities_kernel(LogProbabilities told, const T* logits, int64_t stride, int size, const int64_t* token_ids, int k,
                             int splits) {
  __shared__ Block block;
  const int64_t row = blockIdx.x / splits;
  const int split = blockIdx.x % splits;
  if (threadIdx.x == 0) block.length = 0;
  Cluster cluster(block.exchange, split, splits);
  const Slice<T> slice = slice_of(logits, stride, size, int(row), split, splits);
  wait_for_previous();
  let_next_start();
  const Wide mine = highest_of_thread(slice);
  cluster.wait_for_all();
  const float max = packed_number(cluster.max(mine));
  if (max != max) {
    if (split == 0) tell_nothing(told, row, k);
    return;
  }
  const int chosen = int(token_ids[row]);
  const float score = to_float(slice.row[chosen]);
  const Counted counted = count(slice, cluster, max, score, chosen);
  if (split == 0 && threadIdx.x == 0) told.chosen[row] = score - max - counted.log_total, told.ranks[row] = counted.rank;
  if (k == 0) return;
  const Border border = Search<T>(slice, Scores{max, 1.0f, 1.0f}, cluster, block.columns).likeliest(k);
  tell_likeliest(slice, cluster, block, border, max, counted.log_total, told.top_ids + row * k, told.top + row * k, k);
}

}  // namespace

void log_probabilities(const LogProbabilities& told, const Logits& logits, const int64_t* token_ids, int k, int splits,
                       cudaStream_t stream) {
  splits = choose_splits(logits, splits, 4000);
  dispatch(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows("log_probabilities", log_probabilities_kernel<T>, logits.rows, splits, stream, told,
                static_cast<const T*>(logits.data), logits.stride, logits.size, token_ids, k, splits);
  });
}

}  // namespace batchinfer
