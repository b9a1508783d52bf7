// Matrix products of few rows, bound by reading the weights: `ops.linear`, `ops.norm_linear`, `ops.norm_linear_silu`.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

constexpr int kSkinnyMaxRows = 16;
constexpr int kSkinnyMaxNormRows = 2;     // of those that are normed inside
constexpr int kSkinnyMaxNormed = 8192;  // their elements

// y = x weight^T + bias, for x [rows, size] whose rows lie `x_stride` elements apart, weight [weight_rows, size] and out
// [rows, outputs] without gaps. `size` is a multiple of 64.
struct SkinnyLinear {
  void* out;
  const void* x;
  const void* weight;
  const void* bias;         // [weight_rows] or null
  const void* residual;     // [rows, size] or null: is added to x first. Only with norm_weight, like all that follows
  void* residual_out;       // [rows, size]: x + residual. Overlaps neither x nor residual
  const void* norm_weight;  // [size] or null: x is first normed by its root mean square
  int64_t x_stride, residual_stride;
  int rows, weight_rows, size;
  float eps;
  bool silu_and_mul;  // weight holds gate rows, then up rows; out is silu(gate) * up
};

void skinny_linear(const SkinnyLinear& problem, Dtype dtype, cudaStream_t stream);

}  // namespace batchinfer
