#include "sampling.h"

#include "common/tensor.h"

namespace batchinfer {
namespace {

Logits logits_of(const Tensor& logits, int64_t splits) {
  require(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) <= 1 << 30, "sampling: logits must be [N, V]");
  require(logits.stride(1) == 1 || logits.size(1) == 1, "sampling: the last dimension of logits must be dense");
  require(splits == 0 || splits == 1 || splits == 2 || splits == 4 || splits == 8, "sampling: splits must be 0, 1, 2, 4 or 8");
  return {logits.data_ptr(), logits.size(0), logits.stride(0), static_cast<int>(logits.size(1)), dtype_of(logits)};
}

template <typename T>
T* per_row(const Tensor& tensor, const Tensor& logits, ScalarType dtype, const char* name) {
  require_dtype(tensor, dtype, name);
  require(tensor.dim() == 1 && tensor.size(0) == logits.size(0) && tensor.is_contiguous(),
          std::string("sampling: ") + name + " must be contiguous and have one element for each row");
  return pointer<T>(tensor);
}

void greedy_op(Tensor token_ids, Tensor broken, const Tensor& logits, int64_t splits) {
  greedy(per_row<int32_t>(token_ids, logits, ScalarType::Int, "token_ids"),
         per_row<bool>(broken, logits, ScalarType::Bool, "broken"), logits_of(logits, splits), static_cast<int>(splits),
         Stream(logits));
}

void sample_op(Tensor token_ids, Tensor broken, const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
               const Tensor& top_p, const Tensor& min_p, const Tensor& seeds, const Tensor& positions, int64_t splits) {
  const Drawing drawing = {per_row<double>(temperature, logits, ScalarType::Double, "temperature"),
                           per_row<double>(top_p, logits, ScalarType::Double, "top_p"),
                           per_row<double>(min_p, logits, ScalarType::Double, "min_p"),
                           per_row<int32_t>(top_k, logits, ScalarType::Int, "top_k"),
                           per_row<int32_t>(positions, logits, ScalarType::Int, "positions"),
                           per_row<int64_t>(seeds, logits, ScalarType::Long, "seeds")};
  sample(per_row<int64_t>(token_ids, logits, ScalarType::Long, "token_ids"),
         per_row<bool>(broken, logits, ScalarType::Bool, "broken"), logits_of(logits, splits), drawing, static_cast<int>(splits),
         Stream(logits));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def("greedy(Tensor(a!) token_ids, Tensor(b!) broken, Tensor logits, int splits) -> ()");
  m.def(
      "sample(Tensor(a!) token_ids, Tensor(b!) broken, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, "
      "Tensor min_p, Tensor seeds, Tensor positions, int splits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) {
  m.impl("greedy", TORCH_BOX(&batchinfer::greedy_op));
  m.impl("sample", TORCH_BOX(&batchinfer::sample_op));
}
