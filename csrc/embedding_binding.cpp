#include "embedding.h"

#include "common/tensor.h"

namespace batchinfer {
namespace {

void require_tokens(const Tensor& tensor, const char* name) {
  require(tensor.dim() == 1 && tensor.is_contiguous(), std::string(name) + " must be one-dimensional and contiguous");
  require_dtype(tensor, ScalarType::Int, name);
}

void embedding_op(Tensor out, const Tensor& token_ids, const Tensor& weight, int64_t start, int64_t stop) {
  require_tokens(token_ids, "token_ids");
  require(weight.dim() == 2 && out.dim() == 2 && out.size(0) == token_ids.size(0) && out.size(1) == weight.size(1),
          "embedding: weight must be [V, D], and out [T, D]");
  require(out.is_contiguous() && weight.stride(1) == 1 && out.scalar_type() == weight.scalar_type() && weight.element_size() > 1,
          "embedding: out must be contiguous, weight dense along D, and both of one element type of 2 bytes or more");
  require(start >= 0 && stop - start <= weight.size(0), "embedding: weight must have a row for each id from start to stop");
  const int64_t bytes = weight.element_size();
  embedding(out.data_ptr(), weight.data_ptr(), pointer<int>(token_ids), out.size(0), out.size(1) * bytes,
            weight.stride(0) * bytes, start, stop, in_vectors(out) && in_vectors(weight), Stream(out));
}

void feed_tokens_op(Tensor out, const Tensor& token_ids, const Tensor& last_tokens, const Tensor& slot_mapping,
                    Tensor token_cache) {
  for (const Tensor* tensor : std::initializer_list<const Tensor*>{&out, &token_ids, &slot_mapping}) {
    require_tokens(*tensor, "feed_tokens: token_ids_out, token_ids and slot_mapping");
    require(same_shape(*tensor, token_ids), "feed_tokens: token_ids_out, token_ids and slot_mapping must be [T]");
  }
  require_tokens(last_tokens, "last_tokens");
  require_tokens(token_cache, "token_cache");
  feed_tokens(pointer<int>(out), pointer<int>(token_ids), pointer<int>(last_tokens), pointer<int>(slot_mapping),
              pointer<int>(token_cache), token_ids.size(0), Stream(out));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def("embedding(Tensor(a!) out, Tensor token_ids, Tensor weight, int start, int stop) -> ()");
  m.def(
      "feed_tokens(Tensor(a!) token_ids_out, Tensor token_ids, Tensor last_tokens, Tensor slot_mapping, Tensor(b!) token_cache) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) {
  m.impl("embedding", TORCH_BOX(&batchinfer::embedding_op));
  m.impl("feed_tokens", TORCH_BOX(&batchinfer::feed_tokens_op));
}
