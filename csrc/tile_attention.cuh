// What both tile attention kernels share: how an item's queries and heads become the rows of a tile.
#pragma once

#include "common/device.cuh"
#include "tile_attention.h"

namespace batchinfer {

// The query heads of one key-value head see the same keys, so small items put several heads into one tile: row r is query
// r / pack under head first_head + r % pack. `slot` counts the tiles of an item, one for every `pack` heads.
struct TileShape {
  int pack, rows, first_head, kv_head;

  __device__ __forceinline__ TileShape(int q_count, int slot, int num_heads, int num_kv_heads) {
    const int group = num_heads / num_kv_heads;
    pack = 1;
    for (int p = 2; p <= group && q_count * p <= kTileRows; ++p)
      if (group % p == 0) pack = p;
    rows = q_count * pack;
    first_head = slot * pack;  // >= num_heads: this item has no such tile
    kv_head = first_head / group;
  }
};

// Two floats as one register of two T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four lanes that hold one row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or 16 zero bytes. Without waiting.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace batchinfer
