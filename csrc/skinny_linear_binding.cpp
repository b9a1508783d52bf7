#include "skinny_linear.h"

#include <optional>

#include "common/tensor.h"

namespace batchinfer {
namespace {

void require_like(const Tensor& tensor, const Tensor& x, const char* name) {
  require(tensor.scalar_type() == x.scalar_type(), std::string("skinny_linear: ") + name + " must have the element type of x");
}

void require_row(const std::optional<Tensor>& row, const Tensor& x, int64_t size, const char* name) {
  if (!row) return;
  require(row->dim() == 1 && row->size(0) == size && row->is_contiguous(),
          std::string("skinny_linear: ") + name + " has another size than expected");
  require_like(*row, x, name);
}

void require_residual(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_out) {
  require(residual.has_value() == residual_out.has_value(), "skinny_linear: residual and residual_out come together");
  if (!residual) return;
  for (const Tensor* tensor : {&*residual, &*residual_out}) {
    require(tensor->dim() == 2 && tensor->size(0) == x.size(0) && tensor->size(1) == x.size(1),
            "skinny_linear: residual and residual_out must have the shape of x");
    require_like(*tensor, x, "residual");
    require_vectors(*tensor, "residual");
  }
  require(residual_out->is_contiguous(), "skinny_linear: residual_out must be contiguous");
  require(residual_out->data_ptr() != residual->data_ptr() && residual_out->data_ptr() != x.data_ptr(),
          "skinny_linear: residual_out must be memory of its own");
}

void skinny_linear_op(Tensor out, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                      std::optional<Tensor> residual, std::optional<Tensor> residual_out, std::optional<Tensor> norm_weight,
                      double eps, bool silu_and_mul) {
  require(x.dim() == 2 && weight.dim() == 2 && out.dim() == 2 && x.size(1) == weight.size(1) && out.size(0) == x.size(0),
          "skinny_linear: x must be [T, K], weight [N, K] and out [T, N]");
  require(out.size(1) * (silu_and_mul ? 2 : 1) == weight.size(0), "skinny_linear: out has another width than weight says");
  require(x.size(0) <= kSkinnyMaxRows, "skinny_linear: takes at most 16 rows");
  require(x.size(1) % 64 == 0, "skinny_linear: x and weight must be a multiple of 64 wide");
  require(weight.is_contiguous() && out.is_contiguous(), "skinny_linear: weight and out must be contiguous");
  require_like(weight, x, "weight");
  require_like(out, x, "out");
  require_vectors(x, "x");
  require_vectors(weight, "weight");
  require_row(bias, x, weight.size(0), "bias");
  require_row(norm_weight, x, x.size(1), "norm_weight");
  require(norm_weight || !residual, "skinny_linear: a residual needs norm_weight");
  if (norm_weight) {
    require(x.size(0) <= kSkinnyMaxNormRows && x.size(0) * x.size(1) <= kSkinnyMaxNormed,
            "skinny_linear: norms at most 2 rows and 8,192 elements");
    require_vectors(*norm_weight, "norm_weight");
  }
  require_residual(x, residual, residual_out);
  if (x.size(0) == 0 || weight.size(0) == 0) return;
  auto optional = [](const std::optional<Tensor>& tensor) { return tensor ? pointer<void>(*tensor) : nullptr; };
  const SkinnyLinear problem{
      .out = pointer<void>(out),
      .x = x.data_ptr(),
      .weight = weight.data_ptr(),
      .bias = optional(bias),
      .residual = optional(residual),
      .residual_out = optional(residual_out),
      .norm_weight = optional(norm_weight),
      .x_stride = x.stride(0),
      .residual_stride = residual ? residual->stride(0) : 0,
      .rows = static_cast<int>(x.size(0)),
      .weight_rows = static_cast<int>(weight.size(0)),
      .size = static_cast<int>(x.size(1)),
      .eps = static_cast<float>(eps),
      .silu_and_mul = silu_and_mul,
  };
  skinny_linear(problem, dtype_of(x), Stream(out));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def(
      "skinny_linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(b!)? residual_out, "
      "Tensor? norm_weight, float eps, bool silu_and_mul) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) { m.impl("skinny_linear", TORCH_BOX(&batchinfer::skinny_linear_op)); }
