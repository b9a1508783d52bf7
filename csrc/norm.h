// RMSNorm with residual add: `ops.rms_norm`.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

// Row r lies at data + (r / inner) * outer_stride + (r % inner) * inner_stride elements, so the rows of a view [T, H, D] too.
struct NormRows {
  const void* data;
  int64_t outer_stride, inner_stride;
};

struct Norm {
  void* y;         // [rows, size], dense
  void* total;     // x + residual [rows, size], dense; may be the memory of x or of residual; null without a residual
  NormRows x, residual;
  const void* weight;  // [size]
  int64_t rows;
  int inner, size;
  float eps;
  bool aligned;  // every row of every tensor begins and ends on 16 bytes
};

// The most elements a row may have.
int max_norm_size(Dtype dtype);

void rms_norm(const Norm& norm, Dtype dtype, cudaStream_t stream);

}  // namespace batchinfer
