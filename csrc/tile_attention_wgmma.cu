// Tile attention on Hopper's tensor cores: the algorithm of FlashAttention-3 (Shah et al., 2024) over a paged cache.
//
// A persistent grid, one block per multiprocessor. Two warps of the first warpgroup have keys and values copied into rings of
// shared memory, box by box as the block table says; the two beside them gather the queries of the next tile and describe it.
// Two further warpgroups multiply: 64 rows of a tile each, and each multiplies the next keys and these values while it takes the
// powers of scores; they take turns at issuing products, so that one multiplies while the other takes powers. Tiles of at most 64
// rows: the two share the keys instead, and add up at the end. Keys are visited from the last to the first: masks come first.
#include <cuda.h>

#include <algorithm>

#include "common/launch.h"
#include "tile_attention_consumer.cuh"
#include "tile_attention_producer.cuh"

namespace batchinfer {
namespace {

constexpr int kThreads = kWarpgroup + kConsumers;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    tile_attention_wgmma_kernel(const Call call, const __grid_constant__ CUtensorMap k_map,
                                const __grid_constant__ CUtensorMap v_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  Shared<kHeadDim>& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw + (-shared_address(raw) & (kAtomBytes - 1)));
  if (threadIdx.x == 0) {
    shared.keys.init(1, kConsumers / kWarp);
    shared.values.init(1, kConsumers / kWarp);
    shared.queries.init(kGatherers, kConsumers / kWarp);
    barrier_init_done();
    prefetch_map(&k_map);
    prefetch_map(&v_map);
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
  if (threadIdx.x < kWarpgroup) {
    give_registers<40>();
    const int warp = threadIdx.x / kWarp;
    if (warp == 0)
      copy_cache(call, &k_map, shared.k, shared.keys);
    else if (warp == 1)
      copy_cache(call, &v_map, shared.v, shared.values);
    else
      gather_queries<T, kHeadDim>(call, shared);
  } else {
    take_registers<232>();
    Consumer<T, kHeadDim>(call, shared).run();
  }
#else
  __trap();  // not compiled for sm_90a
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time: nothing links to the driver.
EncodeTiled find_encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result), "encoder");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result), "encoder");
#endif
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

// The cache as [block and head, groups of 8 tokens, halves of 64 columns, 8 tokens, 64 columns]: the order in shared memory.
CUtensorMap describe_cache(const TileAttention& call, const void* cache, const Boxes& boxes) {
  CUtensorMap map;
  const auto type = call.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t row = call.head_dim * 2, halves = call.head_dim / 64;
  const cuuint64_t sizes[] = {64, 8, halves, cuuint64_t(call.block_size / 8), cuuint64_t(call.num_blocks) * boxes.heads_apart};
  const cuuint64_t strides[] = {row, 128, 8 * row, cuuint64_t(call.block_stride / boxes.heads_apart) * 2};
  const cuuint32_t box[] = {64, 8, cuuint32_t(halves), 1u << boxes.box_shift >> 3, 1}, steps[] = {1, 1, 1, 1, 1};
  const CUresult result = find_encode_tiled()(&map, type, 5, const_cast<void*>(cache), sizes, strides, box, steps,
                                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("tile_attention: the cache cannot be described to the copy engine");
  return map;
}

int64_t heads_apart(const TileAttention& call) { return call.num_kv_heads == 1 ? 1 : call.block_stride / call.head_stride; }

}  // namespace

bool tile_attention_wgmma_takes(const TileAttention& call) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 && call.num_blocks > 0 && call.num_tiles > 0 &&
         (call.num_kv_heads == 1 || call.block_stride % call.head_stride == 0) &&
         call.num_blocks * heads_apart(call) < INT32_MAX;
}

void tile_attention_wgmma(const TileAttention& call, cudaStream_t stream) {
  Boxes boxes = {4, 0, static_cast<int>(heads_apart(call))};  // the largest power of two that divides a block
  while ((1 << boxes.box_shift) < kKeys && call.block_size % (2 << boxes.box_shift) == 0) ++boxes.box_shift;
  boxes.boxes_each = call.block_size >> boxes.box_shift;
  const CUtensorMap k_map = describe_cache(call, call.k_cache, boxes), v_map = describe_cache(call, call.v_cache, boxes);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(num_multiprocessors(), int64_t(call.num_tiles) * call.num_heads)));
  dispatch_half(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto run = [&]<int kHeadDim>() {
      constexpr int kBytes = sizeof(Shared<kHeadDim>) + kAtomBytes;  // so that it can begin on an atom
      launch("tile_attention", tile_attention_wgmma_kernel<T, kHeadDim>, grid, dim3(kThreads), kBytes, stream, Call{call, boxes},
             k_map, v_map);
    };
    call.head_dim == 64 ? run.template operator()<64>() : run.template operator()<128>();
  });
}

}  // namespace batchinfer
