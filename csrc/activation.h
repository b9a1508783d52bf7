// SiLU-and-multiply: `ops.silu_and_mul`.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

// out [rows, size] = silu(gate) * up for gate_up [rows, 2 * size], rows `stride` elements apart. aligned: out, gate and up begin
// and end on 16 bytes in every row.
void silu_and_mul(void* out, const void* gate_up, int64_t rows, int size, int64_t stride, bool aligned, Dtype dtype,
                  cudaStream_t stream);

}  // namespace batchinfer
