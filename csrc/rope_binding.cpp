#include "rope.h"

#include "common/tensor.h"

namespace batchinfer {
namespace {

// 16-byte accesses to each half of the last dimension.
bool halves_in_vectors(const Tensor& tensor) {
  return in_vectors(tensor) && tensor.size(tensor.dim() - 1) * tensor.element_size() % 32 == 0;
}

void copy_strides(const Tensor& from, int64_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = from.stride(i);
}

void require_heads(const Tensor& tensor, const Tensor& q, const char* name) {
  require(tensor.dim() == 3 && tensor.size(0) == q.size(0) && tensor.size(2) == q.size(2) && tensor.stride(2) == 1 &&
              tensor.scalar_type() == q.scalar_type(),
          std::string("rope_and_cache: ") + name + " must be [T, heads, D], dense along D, of q's element type");
}

void require_cache(const Tensor& cache, const Tensor& k, const char* name) {
  require(cache.dim() == 4 && cache.size(2) == k.size(1) && cache.size(3) == k.size(2) && cache.stride(3) == 1 &&
              cache.scalar_type() == k.scalar_type(),
          std::string("rope_and_cache: ") + name + " must be [blocks, block_size, K, D], dense along D, of q's element type");
}

void rope_and_cache_op(Tensor out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                       const Tensor& positions, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping) {
  require_heads(q, q, "q");
  require_heads(k, q, "k");
  require_heads(v, q, "v");
  require(same_shape(k, v), "rope_and_cache: k and v must have the same shape");
  require_cache(k_cache, k, "k_cache");
  require_cache(v_cache, k, "v_cache");
  require(k_cache.size(1) == v_cache.size(1), "rope_and_cache: the caches must have the same block size");
  require(same_shape(out, q) && out.is_contiguous() && out.scalar_type() == q.scalar_type(),
          "rope_and_cache: out must be like q, and contiguous");
  require_dtype(cos_sin, ScalarType::Float, "cos_sin");
  require_dtype(positions, ScalarType::Int, "positions");
  require_dtype(slot_mapping, ScalarType::Int, "slot_mapping");
  require(cos_sin.dim() == 2 && cos_sin.size(1) == q.size(2) && cos_sin.is_contiguous() && q.size(2) % 2 == 0,
          "rope_and_cache: cos_sin must be [P, D], contiguous, D even");
  require(positions.dim() == 1 && positions.size(0) == q.size(0) && positions.is_contiguous() &&
              same_shape(slot_mapping, positions) && slot_mapping.is_contiguous(),
          "rope_and_cache: positions and slot_mapping must be [T]");
  Rope rope = {out.data_ptr(),          q.data_ptr(),          k.data_ptr(),  v.data_ptr(), k_cache.data_ptr(),
               v_cache.data_ptr(),      pointer<float>(cos_sin), pointer<int>(positions), pointer<int>(slot_mapping)};
  copy_strides(q, rope.q_strides, 2);
  copy_strides(k, rope.k_strides, 2);
  copy_strides(v, rope.v_strides, 2);
  copy_strides(k_cache, rope.k_cache_strides, 3);
  copy_strides(v_cache, rope.v_cache_strides, 3);
  rope.num_tokens = q.size(0);
  rope.num_heads = q.size(1), rope.num_kv_heads = k.size(1);
  rope.head_dim = q.size(2), rope.block_size = k_cache.size(1);
  rope.aligned = halves_in_vectors(q) && halves_in_vectors(k) && halves_in_vectors(v) && halves_in_vectors(k_cache) &&
                 halves_in_vectors(v_cache) && halves_in_vectors(out) && in_vectors(cos_sin);
  rope_and_cache(rope, dtype_of(q), Stream(out));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def(
      "rope_and_cache(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor(b!) k_cache, "
      "Tensor(c!) v_cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) { m.impl("rope_and_cache", TORCH_BOX(&batchinfer::rope_and_cache_op)); }
