#include "fused_softmax.h"

#include <optional>

#include "common/tensor.h"

namespace batchinfer {
namespace {

Softmax arguments(const Tensor& probs, const Tensor& scores, double scale, const std::optional<Tensor>& ends, int64_t window) {
  require(scores.dim() == 4 && same_shape(probs, scores) && scores.is_contiguous() && probs.is_contiguous(),
          "fused_softmax: scores and probs must be [B, H, Q, L] and contiguous");
  require(scores.size(3) <= INT32_MAX / 2 && scores.numel() / std::max<int64_t>(scores.size(3), 1) <= INT32_MAX,
          "fused_softmax: too many scores");
  require(window >= 0, "fused_softmax: window must be 0 (none) or more");
  if (ends.has_value()) {
    require_dtype(*ends, ScalarType::Int, "ends");
    require(ends->dim() == 2 && ends->size(0) == scores.size(0) && ends->size(1) == scores.size(2) && ends->is_contiguous(),
            "fused_softmax: ends must be [B, Q]");
  }
  Softmax softmax = {probs.data_ptr(), scores.data_ptr(), ends.has_value() ? pointer<int>(*ends) : nullptr};
  softmax.scale = scale;
  softmax.rows = scores.size(3) == 0 ? 0 : scores.numel() / scores.size(3);
  softmax.heads = scores.size(1), softmax.queries = scores.size(2), softmax.length = scores.size(3);
  softmax.window = std::min<int64_t>(window, INT32_MAX / 2);
  return softmax;
}

void fused_softmax_op(Tensor probs, const Tensor& scores, double scale, std::optional<Tensor> ends, int64_t window) {
  fused_softmax(arguments(probs, scores, scale, ends, window), dtype_of(scores), dtype_of(probs), Stream(probs));
}

void fused_softmax_naive_op(Tensor probs, const Tensor& scores, double scale, std::optional<Tensor> ends, int64_t window) {
  fused_softmax_naive(arguments(probs, scores, scale, ends, window), dtype_of(scores), dtype_of(probs), Stream(probs));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def("fused_softmax(Tensor(a!) probs, Tensor scores, float scale, Tensor? ends, int window) -> ()");
  m.def("fused_softmax_naive(Tensor(a!) probs, Tensor scores, float scale, Tensor? ends, int window) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) {
  m.impl("fused_softmax", TORCH_BOX(&batchinfer::fused_softmax_op));
  m.impl("fused_softmax_naive", TORCH_BOX(&batchinfer::fused_softmax_naive_op));
}
