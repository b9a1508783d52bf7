// The warps of Hopper's tile attention that fill shared memory: one with keys, one with values, two with queries.
#pragma once

#include "tile_attention_shared.cuh"

namespace batchinfer {

// Has the keys (or values) of all this block's tiles copied into `tiles`, the last of a tile first. Called by one warp.
template <int kDepth, int kTileBytes>
__device__ __forceinline__ void copy_cache(const Call& call, const CUtensorMap* map, char (*tiles)[kTileBytes],
                                           RingBarriers<kDepth>& barriers) {
  const int lane = threadIdx.x % kWarp, shift = call.boxes.box_shift, first = lane << shift;
  Ring<kDepth> ring;
  for_each_tile(call, [&](const TileItem& item, const TileShape& shape) {
    const Steps steps(item.kv_begin, item.kv_end, shift);
    const int* table = call.block_tables + int64_t(item.sequence) * call.table_stride;
    // The box of this lane: its place in the cache and in the block. Past the end: one that is not there, which gives zeros.
    auto find = [&](int step) {
      const int position = steps.begin + step * kKeys + first, box = position >> shift;
      const bool wanted = first < kKeys && position < item.kv_end;
      const int index = call.boxes.boxes_each == 1 ? box : box / call.boxes.boxes_each;
      const int block = wanted ? table[index] : call.num_blocks;
      return make_int2(block * call.boxes.heads_apart + shape.kv_head, (box - index * call.boxes.boxes_each) << shift >> 3);
    };
    int2 box = find(steps.count - 1);
    for (int step = steps.count - 1; step >= 0; --step) {
      const int2 next = step > 0 ? find(step - 1) : box;  // asked for early
      ring.wait_free(barriers);
      const uint32_t full = shared_address(&barriers.full[ring.place]);
      if (lane == 0) barrier_expect(full, kTileBytes);
      __syncwarp();
      if (first < kKeys) copy_box(shared_address(tiles[ring.place]) + first * (kTileBytes / kKeys), map, full, box.y, box.x);
      ring.advance();
      box = next;
    }
  });
}

// Gathers the queries of all this block's tiles. Called by kGatherers threads; each warp takes every second 32 rows.
template <typename T, int kHeadDim>
__device__ __forceinline__ void gather_queries(const TileAttention& call, Shared<kHeadDim>& shared) {
  constexpr int kPieces = kHeadDim / 8, kChunks = kTileRows / kGatherers;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 2;
  Ring<Shared<kHeadDim>::kQueryStages> ring;
  for_each_tile(call, [&](const TileItem& item, const TileShape& shape) {
    int offsets[kChunks], places[kChunks];  // of this lane's row of every chunk, in pieces of q, and in `out`; -1: no such row
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int row = (chunk * 2 + warp) * kWarp + lane, query = row / shape.pack, head = shape.first_head + row % shape.pack;
      offsets[chunk] = places[chunk] = -1;
      if (row >= shape.rows) continue;
      const int token = call.tile_rows[item.q_begin + query];
      offsets[chunk] = token * int(call.q_stride / 8) + head * kPieces;
      places[chunk] = (item.slot >= 0 ? item.slot + query : token) * call.num_heads + head;
    }
    ring.wait_free(shared.queries);
    Work& work = shared.work[ring.place];
    if (lane == 0 && warp == 0) {
      work.rows = shape.rows;
      work.pack = shape.pack;
      work.kv_begin = item.kv_begin;
      work.kv_end = item.kv_end;
      work.q_position = item.q_position;
      work.partial = item.slot >= 0;
    }
    const uint32_t q = shared_address(shared.q[ring.place]);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int first = (chunk * 2 + warp) * kWarp;
      work.places[first + lane] = places[chunk];
      if (first >= kTileRows / 2 && shape.rows <= kTileRows / 2) break;  // only the first half is multiplied
#pragma unroll 4
      for (int i = 0; i < kPieces; ++i) {
        const int row = (i * kWarp + lane) / kPieces, piece = lane % kPieces;
        const int offset = __shfl_sync(kAllLanes, offsets[chunk], row);
        const T* from = static_cast<const T*>(call.q) + (offset < 0 ? 0 : int64_t(offset + piece) * 8);
        copy_async(q + Shared<kHeadDim>::place(first + row, piece), from, offset >= 0);
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
    publish_shared();
    barrier_arrive(shared_address(&shared.queries.full[ring.place]));
    ring.advance();
  });
  ring.wait_free(shared.queries);
  if (lane == 0 && warp == 0) shared.work[ring.place].rows = 0;  // the end
  barrier_arrive(shared_address(&shared.queries.full[ring.place]));
}

}  // namespace batchinfer
