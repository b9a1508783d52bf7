// What the warpgroups of Hopper's tile attention share: the memory of a block, its barriers, and how tiles are dealt out.
#pragma once

#include "tile_attention.cuh"
#include "tile_attention_hopper.cuh"

namespace batchinfer {

constexpr int kKeys = 128;  // of one step
constexpr int kConsumers = 2 * kWarpgroup, kGatherers = 2 * kWarp;
static_assert(kTileRows == kKeys);

// Barriers of a ring of kDepth places: full when what was asked for is there, free when nobody needs it any more.
template <int kDepth>
struct RingBarriers {
  uint64_t full[kDepth], free[kDepth];
  __device__ __forceinline__ void init(int fillers, int users) {
    for (int i = 0; i < kDepth; ++i) {
      barrier_init(shared_address(&full[i]), fillers);
      barrier_init(shared_address(&free[i]), users);
    }
  }
};

// A position in such a ring.
template <int kDepth>
struct Ring {
  int place = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++place == kDepth) {
      place = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void wait_full(RingBarriers<kDepth>& barriers) const {
    barrier_wait(shared_address(&barriers.full[place]), parity);
  }
  __device__ __forceinline__ void wait_free(RingBarriers<kDepth>& barriers) const {
    barrier_wait(shared_address(&barriers.free[place]), parity ^ 1);
  }
};

// A tile as the gatherers describe it to those that multiply.
struct Work {
  int rows, pack, kv_begin, kv_end, q_position, partial;
  int places[kTileRows];  // by row of the tile: the row of `out` or `partial_out`, seen as [.., head_dim]
};

// Tiles of queries, keys and values are made of atoms of 8 rows and 64 columns: 8 rows, the atoms of their columns one after
// another, then the next 8 rows.
template <int kHeadDim>
struct Shared {
  static constexpr int kTileBytes = kTileRows * kHeadDim * 2, kRowStep = kHeadDim / 64 * kAtomBytes;
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2, kQueryStages = 2;
  alignas(kAtomBytes) char q[kQueryStages][kTileBytes];
  alignas(kAtomBytes) char k[kStages][kTileBytes];
  alignas(kAtomBytes) char v[kStages][kTileBytes];
  RingBarriers<kStages> keys, values;
  RingBarriers<kQueryStages> queries;
  Work work[kQueryStages];
  float tops[kTileRows / 2], sums[kTileRows / 2], scratch[kConsumers];

  // Where 16-byte piece `piece` of row `row` lies in a tile.
  static __device__ __forceinline__ uint32_t place(int row, int piece) {
    return row / 8 * kRowStep + piece / 8 * kAtomBytes + row % 8 * 128 + ((piece % 8 ^ row % 8) << 4);
  }
};

// Keys and values are copied in boxes of 2^box_shift tokens of one block and head, boxes_each to a block.
struct Boxes {
  int box_shift, boxes_each;
  int heads_apart;  // the blocks of a head lie as many heads apart
};

struct Call : TileAttention {
  Boxes boxes;
};

// The keys of a tile: from the beginning of a box on, in steps of kKeys.
struct Steps {
  int begin, count;
  __device__ __forceinline__ Steps(int kv_begin, int kv_end, int box_shift)
      : begin(kv_begin >> box_shift << box_shift), count(max(1, (kv_end - begin + kKeys - 1) / kKeys)) {}
};

// Goes over this block's tiles: `body(item, shape)`. Tiles (the heads of the first item, of the next ...) are dealt out in turn,
// back and forth, since the longest come first.
template <typename Body>
__device__ __forceinline__ void for_each_tile(const TileAttention& call, Body&& body) {
  const int count = call.num_tiles * call.num_heads;
  auto find = [&](int round) { return round * int(gridDim.x) + int(round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x); };
  TileItem item = call.tiles[find(0) / call.num_heads];
  for (int round = 0; find(round) < count && item.q_count > 0; ++round) {
    TileItem next = {};
    if (find(round + 1) < count) next = call.tiles[find(round + 1) / call.num_heads];  // asked for early
    const TileShape shape(item.q_count, find(round) % call.num_heads, call.num_heads, call.num_kv_heads);
    if (shape.first_head < call.num_heads) body(item, shape);
    item = next;
  }
}

}  // namespace batchinfer
