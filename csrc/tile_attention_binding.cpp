#include "common/tensor.h"
#include "tile_attention.h"

namespace batchinfer {
namespace {

void require_index(const Tensor& tensor, int64_t dim, const char* name) {
  require_dtype(tensor, ScalarType::Int, name);
  require(tensor.dim() == dim && tensor.is_contiguous(), std::string(name) + " must be contiguous and have the expected shape");
}

void require_cache(const Tensor& cache, const Tensor& q, const char* name) {
  const std::string told(name);
  require(cache.dim() == 4 && cache.size(3) == q.size(2), told + " must be [blocks, block_size, K, D] with the head size of q");
  require(cache.scalar_type() == q.scalar_type(), told + " must have the element type of q");
  require_vectors(cache, name);
  require(cache.stride(1) == cache.size(3), told + ": the tokens of a block and head must lie one after another");
  require(cache.size(1) % 16 == 0, told + ": the block size must be a multiple of 16");
}

void tile_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                       const Tensor& tiles, const Tensor& tile_rows, Tensor out, Tensor partial_out, Tensor partial_lse,
                       double scale, int64_t window) {
  require(q.dim() == 3 && (q.size(2) == 64 || q.size(2) == 128), "tile_attention: q must be [T, H, D] with D 64 or 128");
  require(q.stride(1) == q.size(2), "tile_attention: the heads of q must lie one after another");
  require_vectors(q, "q");
  require(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
          "tile_attention: q must be float16 or bfloat16");
  require_cache(k_cache, q, "k_cache");
  require_cache(v_cache, q, "v_cache");
  require(k_cache.size(0) == v_cache.size(0) && k_cache.stride(0) == v_cache.stride(0) && k_cache.stride(2) == v_cache.stride(2),
          "tile_attention: k_cache and v_cache must be laid out alike");
  require(k_cache.size(2) > 0 && q.size(1) % k_cache.size(2) == 0, "tile_attention: heads must be a multiple of key-value heads");
  require_index(block_tables, 2, "block_tables");
  require_index(tiles, 2, "tiles");
  require_index(tile_rows, 1, "tile_rows");
  require(tiles.size(1) == kTileFields, "tile_attention: tiles must be [NT, 8]");
  require(out.is_contiguous() && out.dim() == 3 && out.size(1) == q.size(1) && out.size(2) == q.size(2) &&
              out.scalar_type() == q.scalar_type(),
          "tile_attention: out must be contiguous [T, H, D] of the element type of q");
  require_dtype(partial_out, ScalarType::Float, "partial_out");
  require_dtype(partial_lse, ScalarType::Float, "partial_lse");
  require(partial_out.is_contiguous() && partial_lse.is_contiguous(), "tile_attention: partials must be contiguous");
  require(scale > 0 && window >= 0, "tile_attention: the scale must be positive, and the window not negative");
  TileAttention call = {};
  call.q = q.data_ptr();
  call.k_cache = k_cache.data_ptr();
  call.v_cache = v_cache.data_ptr();
  call.block_tables = pointer<const int>(block_tables);
  call.tiles = pointer<const TileItem>(tiles);
  call.tile_rows = pointer<const int>(tile_rows);
  call.out = out.data_ptr();
  call.partial_out = pointer<float>(partial_out);
  call.partial_lse = pointer<float>(partial_lse);
  call.q_stride = q.stride(0);
  call.block_stride = k_cache.stride(0);
  call.head_stride = k_cache.stride(2);
  call.num_tiles = static_cast<int>(tiles.size(0));
  call.num_blocks = static_cast<int>(k_cache.size(0));
  call.table_stride = static_cast<int>(block_tables.size(1));
  call.num_heads = static_cast<int>(q.size(1));
  call.num_kv_heads = static_cast<int>(k_cache.size(2));
  call.head_dim = static_cast<int>(q.size(2));
  call.block_size = static_cast<int>(k_cache.size(1));
  call.window = static_cast<int>(window);
  call.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  call.dtype = dtype_of(q);
  tile_attention(call, Stream(q));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def(
      "tile_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor tiles, Tensor tile_rows, "
      "Tensor(a!) out, Tensor(b!) partial_out, Tensor(c!) partial_lse, float scale, int window) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) { m.impl("tile_attention", TORCH_BOX(&batchinfer::tile_attention_op)); }
