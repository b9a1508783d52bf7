// How many blocks share a row of logits, and launching them as clusters.
#pragma once

#include "common/launch.h"
#include "sampling.h"
#include "sampling_row.cuh"

namespace batchinfer {

struct RowLaunch {
  int splits;  // blocks of a cluster, which share a row
  int room;    // words of shared memory in each for the tokens that filters search; 0: they do not fit
};

inline int words_of_slice(const Logits& logits, int splits) {
  const int vector = logits.dtype == Dtype::kFloat32 ? 4 : 8, step = kSampleThreads * vector;
  const int share = (logits.size + splits * vector - 1) / (splits * vector) * vector;
  return (share + step - 1) / step * step;
}

// A power of two of blocks for each row: at least two for each multiprocessor in all, unless a block would have next to nothing to
// do, and enough that what is searched has room where two blocks share a multiprocessor's memory. One where there are no clusters.
inline RowLaunch plan_rows(const Logits& logits, int splits, bool searches) {
  const int most_words = (device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 12 * 1024) / 4;
  if (!is_hopper_or_later()) splits = 1;
  if (splits == 0) {
    splits = 1;
    while (splits < kMaxSplits && logits.size > splits * kSampleThreads * 8 &&
           (logits.rows * splits < 2 * num_multiprocessors() || (searches && words_of_slice(logits, splits) > most_words)))
      splits *= 2;
  }
  const int words = words_of_slice(logits, splits);
  return {splits, searches && words <= most_words ? words : 0};
}

// `launch` for one cluster for each row.
template <typename... Parameters, typename... Arguments>
void launch_rows(const char* name, void (*kernel)(Parameters...), int64_t rows, const RowLaunch& plan, cudaStream_t stream,
                 Arguments&&... arguments) {
  if (rows == 0) return;
  const size_t smem = size_t(plan.room) * sizeof(uint32_t);
  if (smem > 32 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)), name);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.splits), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(rows * plan.splits);
  config.blockDim = dim3(kSampleThreads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper_or_later() ? 0 : plan.splits == 1 ? 1 : 2;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace batchinfer
