#include <algorithm>

#include "common/tensor.h"
#include "decode_attention.h"

namespace batchinfer {
namespace {

constexpr int kSegmentFields = 8, kMaxGroup = 16;

void require_indices(const Tensor& tensor, int64_t dims, const char* name) {
  require_dtype(tensor, ScalarType::Int, name);
  require(tensor.dim() == dims && (dims > 1 || tensor.is_contiguous()),
          std::string(name) + ": wrong number of dimensions, or not dense");
}

// [blocks, block_size, K, D] as a view of memory [blocks, K, block_size, D].
void require_cache(const Tensor& cache, const Tensor& q, const char* name) {
  require(cache.dim() == 4 && cache.size(3) == q.size(2) && cache.scalar_type() == q.scalar_type(),
          std::string(name) + " must be [blocks, block_size, K, D] of q's element type");
  require(cache.stride(1) == cache.size(3), std::string(name) + ": the tokens of a block must lie together");
  require(cache.size(1) % 16 == 0, std::string(name) + ": the block size must be a multiple of 16");
  require_vectors(cache, name);
}

void require_partials(const Tensor& partial_out, const Tensor& partial_lse, int64_t heads, int64_t dim) {
  require_dtype(partial_out, ScalarType::Float, "partial_out");
  require_dtype(partial_lse, ScalarType::Float, "partial_lse");
  require(partial_out.dim() == 3 && partial_out.size(1) == heads && partial_out.size(2) == dim && partial_out.is_contiguous(),
          "partial_out must be [slots, H, D], contiguous");
  const bool alike = partial_lse.dim() == 2 && partial_lse.size(0) == partial_out.size(0) && partial_lse.size(1) == heads;
  require(alike && partial_lse.is_contiguous(),
          "partial_lse must be [slots, H], contiguous");
}

void require_out(const Tensor& out, int64_t heads, int64_t dim) {
  require(out.dim() == 3 && out.size(1) == heads && out.size(2) == dim, "out must be [T, H, D]");
  require(out.is_contiguous(), "out must be contiguous");
  require(dim == 64 || dim == 128, "the head dimension must be 64 or 128");
}

void decode_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                         const Tensor& segments, const Tensor& part_indptr, Tensor out, Tensor partial_out, Tensor partial_lse,
                         double scale, int64_t warps) {
  require(q.dim() == 3 && q.stride(1) == q.size(2), "q must be [T, H, D] with dense rows");
  require_vectors(q, "q");
  require_cache(k_cache, q, "k_cache");
  require_cache(v_cache, q, "v_cache");
  const int64_t heads = q.size(1), kv_heads = k_cache.size(2), dim = q.size(2);
  require(v_cache.size(1) == k_cache.size(1) && v_cache.size(2) == kv_heads, "k_cache and v_cache must have the same shape");
  require(kv_heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= kMaxGroup, "1 to 16 query heads must share a KV head");
  require_out(out, heads, dim);
  require(out.scalar_type() == q.scalar_type(), "out must be of q's element type");
  require_partials(partial_out, partial_lse, heads, dim);
  require_indices(block_tables, 2, "block_tables");
  require(block_tables.size(1) <= 1 || block_tables.stride(1) == 1, "block_tables: rows must be dense");
  require_indices(segments, 2, "segments");
  require(segments.size(1) == kSegmentFields && segments.is_contiguous(), "segments must be [.., 8], contiguous");
  require(reinterpret_cast<uintptr_t>(segments.data_ptr()) % 16 == 0, "segments must begin on 16 bytes");
  require_indices(part_indptr, 1, "part_indptr");
  require(part_indptr.size(0) >= 1 && part_indptr.size(0) <= 65536, "part_indptr must have 1 to 65536 entries");
  require(warps >= 1 && warps <= 16, "warps must be 1 to 16");
  const DecodeAttention a{
      .q = q.data_ptr(),
      .q_stride = q.stride(0),
      .k_cache = k_cache.data_ptr(),
      .v_cache = v_cache.data_ptr(),
      .k_block_stride = k_cache.stride(0),
      .k_head_stride = k_cache.stride(2),
      .v_block_stride = v_cache.stride(0),
      .v_head_stride = v_cache.stride(2),
      .block_tables = pointer<const int>(block_tables),
      .table_stride = block_tables.stride(0),
      .segments = pointer<const int>(segments),
      .part_indptr = pointer<const int>(part_indptr),
      .out = out.data_ptr(),
      .partial_out = pointer<float>(partial_out),
      .partial_lse = pointer<float>(partial_lse),
      .num_parts = static_cast<int>(part_indptr.size(0) - 1),
      .num_heads = static_cast<int>(heads),
      .num_kv_heads = static_cast<int>(kv_heads),
      .block_size = static_cast<int>(k_cache.size(1)),
      .num_segments = static_cast<int>(segments.size(0)),
      .num_tables = static_cast<int>(block_tables.size(0)),
      .table_width = static_cast<int>(block_tables.size(1)),
      .num_blocks = static_cast<int>(std::min(k_cache.size(0), v_cache.size(0))),
      .scale = static_cast<float>(scale),
  };
  decode_attention(a, static_cast<int>(dim), static_cast<int>(warps), dtype_of(q), Stream(out));
}

void combine_attention_op(Tensor out, const Tensor& partial_out, const Tensor& partial_lse, const Tensor& combine_rows,
                          const Tensor& combine_indptr, const Tensor& combine_slots) {
  require(out.dim() == 3, "out must be [T, H, D]");
  const int64_t heads = out.size(1), dim = out.size(2);
  require_out(out, heads, dim);
  require_partials(partial_out, partial_lse, heads, dim);
  require_indices(combine_rows, 1, "combine_rows");
  require_indices(combine_indptr, 1, "combine_indptr");
  require_indices(combine_slots, 1, "combine_slots");
  require(combine_indptr.size(0) == combine_rows.size(0) + 1, "combine_indptr must have one entry more than combine_rows");
  require(combine_rows.size(0) <= 65535, "combine_rows must have at most 65535 entries");
  const CombineAttention a{
      .out = out.data_ptr(),
      .partial_out = pointer<const float>(partial_out),
      .partial_lse = pointer<const float>(partial_lse),
      .rows = pointer<const int>(combine_rows),
      .indptr = pointer<const int>(combine_indptr),
      .slots = pointer<const int>(combine_slots),
      .num_rows = static_cast<int>(combine_rows.size(0)),
      .num_heads = static_cast<int>(heads),
  };
  combine_attention(a, static_cast<int>(dim), dtype_of(out), Stream(out));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor segments, Tensor part_indptr, "
      "Tensor(a!) out, Tensor(b!) partial_out, Tensor(c!) partial_lse, float scale, int warps) -> ()");
  m.def(
      "combine_attention(Tensor(a!) out, Tensor partial_out, Tensor partial_lse, Tensor combine_rows, Tensor combine_indptr, "
      "Tensor combine_slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&batchinfer::decode_attention_op));
  m.impl("combine_attention", TORCH_BOX(&batchinfer::combine_attention_op));
}
