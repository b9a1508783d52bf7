#include "logprobs.h"

#include "common/tensor.h"

namespace batchinfer {
namespace {

template <typename T>
T* checked(const Tensor& tensor, int64_t rows, int64_t columns, ScalarType dtype) {
  require_dtype(tensor, dtype, "log_probabilities: token_ids or a result");
  require(tensor.dim() == (columns < 0 ? 1 : 2) && tensor.size(0) == rows && (columns < 0 || tensor.size(1) == columns),
          "log_probabilities: token_ids, chosen and ranks must be [N], top_ids and top [N, k]");
  require(tensor.is_contiguous(), "log_probabilities: token_ids and results must be contiguous");
  return pointer<T>(tensor);
}

void log_probabilities_op(Tensor chosen, Tensor ranks, Tensor top_ids, Tensor top, const Tensor& logits, const Tensor& token_ids,
                          int64_t splits) {
  require(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) <= 1 << 30, "log_probabilities: logits must be [N, V]");
  require(logits.stride(1) == 1 || logits.size(1) == 1, "log_probabilities: the last dimension of logits must be dense");
  require(splits == 0 || splits == 1 || splits == 2 || splits == 4 || splits == 8,
          "log_probabilities: splits must be 0, 1, 2, 4 or 8");
  require(top.dim() == 2 && top.size(1) <= kMostLikeliest && top.size(1) <= logits.size(1),
          "log_probabilities: k must be at most 1024, and the vocabulary's size");
  const int64_t rows = logits.size(0), k = top.size(1);
  const LogProbabilities told = {
      checked<float>(chosen, rows, -1, ScalarType::Float), checked<int64_t>(ranks, rows, -1, ScalarType::Long),
      checked<int64_t>(top_ids, rows, k, ScalarType::Long), checked<float>(top, rows, k, ScalarType::Float)};
  log_probabilities(told, {logits.data_ptr(), rows, logits.stride(0), static_cast<int>(logits.size(1)), dtype_of(logits)},
                    checked<int64_t>(token_ids, rows, -1, ScalarType::Long), static_cast<int>(k), static_cast<int>(splits),
                    Stream(logits));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def(
      "log_probabilities(Tensor(a!) chosen, Tensor(b!) ranks, Tensor(c!) top_ids, Tensor(d!) top, Tensor logits, "
      "Tensor token_ids, int splits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) { m.impl("log_probabilities", TORCH_BOX(&batchinfer::log_probabilities_op)); }
