// How many blocks share a row of logits, and launching them as clusters.
#pragma once

#include "common/launch.h"
#include "sampling.h"
#include "sampling_row.cuh"

namespace batchinfer {

// A power of two, if `given` is 0: more than one block where rows leave multiprocessors idle, as long as each has `least` tokens
// or more. One where there are no clusters.
inline int choose_splits(const Logits& logits, int given, int least) {
  if (!is_hopper_or_later()) return 1;
  if (given > 0) return given;
  int splits = 1;
  while (splits < kMaxSplits && 2 * splits * logits.rows <= num_multiprocessors() && logits.size >= 2 * splits * least)
    splits *= 2;
  return splits;
}

// `launch` for one cluster of blocks for each row.
template <typename... Parameters, typename... Arguments>
void launch_rows(const char* name, void (*kernel)(Parameters...), int64_t rows, int splits, cudaStream_t stream,
                 Arguments&&... arguments) {
  if (rows == 0) return;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(rows * splits);
  config.blockDim = dim3(kSampleThreads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper_or_later() ? 0 : splits == 1 ? 1 : 2;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace batchinfer
