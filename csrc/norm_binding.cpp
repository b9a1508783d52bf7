#include "norm.h"

#include <optional>

#include "common/tensor.h"

namespace batchinfer {
namespace {

// The rows of [D], [T, D] or [T, H, D].
NormRows rows_of(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  return {tensor.data_ptr(), dims >= 2 ? tensor.stride(0) : 0, dims == 3 ? tensor.stride(1) : 0};
}

void rms_norm_op(Tensor y, const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual,
                 std::optional<Tensor> total) {
  const int64_t dims = x.dim(), size = x.size(dims - 1);
  const Dtype dtype = dtype_of(x);
  require(dims >= 1 && dims <= 3 && same_shape(y, x), "rms_norm: x must be [D], [T, D] or [T, H, D], and y like it");
  require(y.is_contiguous() && y.scalar_type() == x.scalar_type(), "rms_norm: y must be contiguous and of x's element type");
  require(x.stride(dims - 1) == 1, "rms_norm: the last dimension of x must be dense");
  require(weight.dim() == 1 && weight.size(0) == size && weight.is_contiguous() && weight.scalar_type() == x.scalar_type(),
          "rms_norm: weight must be [D] of x's element type");
  require(size <= max_norm_size(dtype), "rms_norm: rows are too long");
  require(residual.has_value() == total.has_value(), "rms_norm: residual and total go together");
  Norm norm = {y.data_ptr(), nullptr, rows_of(x), {}, weight.data_ptr()};
  norm.aligned = in_vectors(x) && in_vectors(y) && in_vectors(weight);
  if (residual.has_value()) {
    require(same_shape(*residual, x) && residual->scalar_type() == x.scalar_type() && residual->stride(dims - 1) == 1,
            "rms_norm: residual must be of x's shape and element type, its last dimension dense");
    require(same_shape(*total, x) && total->scalar_type() == x.scalar_type() && total->is_contiguous(),
            "rms_norm: total must be of x's shape and element type, and contiguous");
    norm.residual = rows_of(*residual);
    norm.total = total->data_ptr();
    norm.aligned = norm.aligned && in_vectors(*residual) && in_vectors(*total);
  }
  norm.inner = dims == 3 ? std::max<int64_t>(x.size(1), 1) : 1;
  norm.rows = size == 0 ? 0 : x.numel() / size;
  norm.size = size;
  norm.eps = eps;
  require(norm.rows <= INT32_MAX, "rms_norm: too many rows");
  rms_norm(norm, dtype, Stream(y));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def("rms_norm(Tensor(a!) y, Tensor x, Tensor weight, float eps, Tensor? residual, Tensor(b!)? total) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) { m.impl("rms_norm", TORCH_BOX(&batchinfer::rms_norm_op)); }
