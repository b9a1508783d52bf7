// Tile attention on Hopper's tensor cores: the algorithm of FlashAttention-3 (Shah et al., 2024) over a paged cache.
//
// A persistent grid, one block per multiprocessor. One warp of the first warpgroup has keys and values copied into rings of shared
// memory, box by box as the block table says; the three beside it gather the queries of the next tile and describe it. Two further
// warpgroups multiply: 64 rows of a tile each, and each multiplies the scores of the next keys while it takes the powers of
// these; they take turns at issuing products, so that one multiplies while the other takes powers. Tiles of at most 64 rows: the
// two share the keys instead, and add up at the end. Keys are visited from the last to the first, so masks come first.
#include <cuda.h>

#include <algorithm>

#include "common/launch.h"
#include "tile_attention.cuh"
#include "tile_attention_hopper.cuh"

namespace batchinfer {
namespace {

constexpr int kKeys = 128, kStages = 2;
constexpr int kConsumers = 2 * kWarpgroup, kThreads = kConsumers + kWarpgroup;
constexpr int kGatherers = kWarpgroup - kWarp;
constexpr int kHalfBytes = kKeys * 128;  // 64 elements of 128 rows: what a tile of keys, values or queries has per half
static_assert(kTileRows == kKeys);

enum Barrier { kKeysFull, kKeysFree = kKeysFull + kStages, kValuesFull = kKeysFree + kStages, kValuesFree = kValuesFull + kStages,
               kQueriesFull = kValuesFree + kStages, kQueriesFree = kQueriesFull + kStages, kBarriers = kQueriesFree + kStages };
enum Meeting { kTurn = 1, kWithin = 3, kBoth = 5 };  // hardware barriers; the first two one per warpgroup

// A tile as the gatherers describe it to those that multiply.
struct Work {
  int rows, pack, kv_begin, kv_end, q_position, partial;
  int places[kTileRows];  // row of `out` or `partial_out` seen as [.., head_dim], by row of the tile
};

template <int kHeadDim>
struct Shared {
  static constexpr int kTileBytes = kHeadDim / 64 * kHalfBytes;
  alignas(kAtomBytes) char q[kStages][kTileBytes];
  alignas(kAtomBytes) char k[kStages][kTileBytes];
  alignas(kAtomBytes) char v[kStages][kTileBytes];
  uint64_t barriers[kBarriers];
  Work work[kStages];
  float tops[kTileRows / 2], sums[kTileRows / 2], scratch[kConsumers];
};

struct Call {
  TileAttention call;
  int box_rows, boxes;  // tokens of a copied box, boxes of kKeys tokens
};

// The tiles of this block: tile, head, tile, head ... are dealt out in turn, back and forth, since the longest come first.
struct Deal {
  int round = 0;
  __device__ __forceinline__ int next() {
    const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    return round++ * gridDim.x + place;
  }
};

// Goes over this block's tiles: `body(item, shape)`.
template <typename Body>
__device__ __forceinline__ void for_each_tile(const TileAttention& call, Body&& body) {
  Deal deal;
  for (int i = deal.next(); i < call.num_tiles * call.num_heads; i = deal.next()) {
    const TileItem item = call.tiles[i / call.num_heads];
    if (item.q_count <= 0) return;
    const TileShape shape(item.q_count, i % call.num_heads, call.num_heads, call.num_kv_heads);
    if (shape.first_head < call.num_heads) body(item, shape);
  }
}

__device__ __forceinline__ int steps_of(int kv_begin, int kv_end, int box_rows) {
  return max(1, (kv_end - kv_begin / box_rows * box_rows + kKeys - 1) / kKeys);
}

// Position in a ring of stages.
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    stage ^= 1;
    parity ^= stage == 0;
  }
};
static_assert(kStages == 2);

template <int kHeadDim>
__device__ __forceinline__ void copy_keys_and_values(const Call& call, const CUtensorMap* k_map, const CUtensorMap* v_map,
                                                     Shared<kHeadDim>& shared, uint32_t barriers) {
  constexpr int kHalves = kHeadDim / 64;
  const int lane = threadIdx.x % kWarp, half = lane / call.boxes, first = lane % call.boxes * call.box_rows;
  const bool active = half < kHalves;
  const uint32_t offset = half * kHalfBytes + first * 128;
  Ring k_ring, v_ring;
  for_each_tile(call.call, [&](const TileItem& item, const TileShape& shape) {
    const int begin = item.kv_begin / call.box_rows * call.box_rows;
    const int steps = steps_of(item.kv_begin, item.kv_end, call.box_rows);
    const int* table = call.call.block_tables + int64_t(item.sequence) * call.call.table_stride;
    // The block and the row in it of this lane's box. Past the end: a block that is not there, which gives zeros.
    auto find = [&](int step, int& block, int& row) {
      const int position = begin + step * kKeys + first, index = position / call.call.block_size;
      row = position - index * call.call.block_size;
      block = active && position < item.kv_end ? table[index] : call.call.num_blocks;
    };
    auto copy = [&](const CUtensorMap* map, char (*tiles)[Shared<kHeadDim>::kTileBytes], int full, int free, Ring& ring, int block,
                    int row) {
      barrier_wait(barriers + 8 * (free + ring.stage), ring.parity ^ 1);
      const uint32_t barrier = barriers + 8 * (full + ring.stage);
      if (lane == 0) barrier_expect(barrier, Shared<kHeadDim>::kTileBytes);
      __syncwarp();
      if (active) copy_box(shared_address(tiles[ring.stage]) + offset, map, barrier, half * 64, row, shape.kv_head, block);
      ring.advance();
    };
    int block, row, next_block = 0, next_row = 0;
    find(steps - 1, block, row);
    copy(k_map, shared.k, kKeysFull, kKeysFree, k_ring, block, row);
    for (int step = steps - 1; step >= 0; --step) {
      if (step > 0) {
        find(step - 1, next_block, next_row);
        copy(k_map, shared.k, kKeysFull, kKeysFree, k_ring, next_block, next_row);
      }
      copy(v_map, shared.v, kValuesFull, kValuesFree, v_ring, block, row);
      block = next_block;
      row = next_row;
    }
  });
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void gather_queries(const TileAttention& call, Shared<kHeadDim>& shared, uint32_t barriers) {
  constexpr int kPieces = kHeadDim / 8;
  const int thread = threadIdx.x - kWarp;
  Ring ring;
  for_each_tile(call, [&](const TileItem& item, const TileShape& shape) {
    Work& work = shared.work[ring.stage];
    const uint32_t q = shared_address(shared.q[ring.stage]);
    barrier_wait(barriers + 8 * (kQueriesFree + ring.stage), ring.parity ^ 1);
    if (thread == 0) {
      work.rows = shape.rows;
      work.pack = shape.pack;
      work.kv_begin = item.kv_begin;
      work.kv_end = item.kv_end;
      work.q_position = item.q_position;
      work.partial = item.slot >= 0;
    }
    for (int row = thread; row < shape.rows; row += kGatherers) {
      const int query = row / shape.pack;
      const int place = item.slot >= 0 ? item.slot + query : call.tile_rows[item.q_begin + query];
      work.places[row] = place * call.num_heads + shape.first_head + row % shape.pack;
    }
    const int used = shape.rows > kTileRows / 2 ? kTileRows : kTileRows / 2;
    for (int i = thread; i < used * kPieces; i += kGatherers) {
      const int row = i / kPieces, piece = i % kPieces, query = row / shape.pack;
      const bool wanted = row < shape.rows;
      const T* from = static_cast<const T*>(call.q);
      if (wanted)
        from += call.tile_rows[item.q_begin + query] * call.q_stride + (shape.first_head + row % shape.pack) * kHeadDim + piece * 8;
      copy_async(q + piece / 8 * kHalfBytes + row * 128 + (((piece % 8) ^ (row % 8)) << 4), from, wanted);
    }
    copy_async_commit();
    copy_async_wait<0>();
    publish_shared();
    barrier_arrive(barriers + 8 * (kQueriesFull + ring.stage));
    ring.advance();
  });
  barrier_wait(barriers + 8 * (kQueriesFree + ring.stage), ring.parity ^ 1);
  if (thread == 0) shared.work[ring.stage].rows = 0;  // the end
  barrier_arrive(barriers + 8 * (kQueriesFull + ring.stage));
}

// What a thread of a multiplying warpgroup holds: two rows of the tile, 8 apart, and of each the columns 8 j + 2 (lane % 4) + {0, 1}.
template <typename T, int kHeadDim>
struct Consumer {
  static constexpr int kScores = kKeys / 2, kOuts = kHeadDim / 2;
  const Call& call;
  Shared<kHeadDim>& shared;
  const uint32_t barriers, group, thread, lane, scratch;
  Ring k_ring, v_ring, q_ring;
  float o[kOuts], s[kScores], top[2], sum[2];
  uint32_t p[kScores / 2];
  int low[2], high[2], clear_low, clear_high;  // positions that each row sees, and that all rows see
  bool split;                                  // the warpgroups hold the same rows
  uint64_t q_operand;

  __device__ __forceinline__ Consumer(const Call& call, Shared<kHeadDim>& shared, uint32_t barriers)
      : call(call), shared(shared), barriers(barriers), group(threadIdx.x / kWarpgroup - 1), thread(threadIdx.x % kWarpgroup),
        lane(threadIdx.x % kWarp), scratch(shared_address(shared.scratch + threadIdx.x - kWarpgroup)) {}

  __device__ __forceinline__ void wait_full(int full, const Ring& ring) { barrier_wait(barriers + 8 * (full + ring.stage), ring.parity); }
  __device__ __forceinline__ void release(int free, Ring& ring) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers + 8 * (free + ring.stage));
    ring.advance();
  }
  // Lets the other warpgroup have a step's keys and values.
  __device__ __forceinline__ void leave_step() {
    wait_full(kKeysFull, k_ring);
    release(kKeysFree, k_ring);
    wait_full(kValuesFull, v_ring);
    release(kValuesFree, v_ring);
  }

  __device__ __forceinline__ void multiply_keys() {
    const uint64_t k_operand = describe(shared_address(shared.k[k_ring.stage]), 0);
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const uint64_t offset = (i / 4 * kHalfBytes + i % 4 * 32) >> 4;
      multiply_shared<T>(s, q_operand + offset, k_operand + offset, i > 0);
    }
    products_commit();
  }
  __device__ __forceinline__ void multiply_values() {
    const uint64_t v_operand = describe(shared_address(shared.v[v_ring.stage]), kHalfBytes);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      const uint32_t(&a)[4] = *reinterpret_cast<const uint32_t(*)[4]>(&p[4 * i]);
      multiply_registers<T>(o, a, v_operand + (i * 2 * kAtomBytes >> 4));
    }
    products_commit();
  }

  __device__ __forceinline__ void mask(int begin) {
    if (begin >= clear_low && begin + kKeys - 1 <= clear_high) return;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int position = begin + i / 4 * 8 + int(lane % 4) * 2 + i % 2, row = i / 2 % 2;
      if (position < low[row] || position > high[row]) s[i] = -INFINITY;
    }
  }
  // Turns scores into powers, and gives by how much earlier sums fade.
  __device__ __forceinline__ void take_powers(float (&fade)[2]) {
    const float scale = call.call.scale_log2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = top[row];
#pragma unroll
      for (int i = row * 2; i < kScores; i += 4) most = fmaxf(most, fmaxf(s[i], s[i + 1]));
      most = quad_max(most);
      const float shift = most == -INFINITY ? 0.0f : most * scale;
      fade[row] = exp2_fast(top[row] * scale - shift);
      top[row] = most;
      float added = 0.0f;
#pragma unroll
      for (int i = row * 2; i < kScores; i += 4) {
        s[i] = exp2_fast(s[i] * scale - shift);
        s[i + 1] = exp2_fast(s[i + 1] * scale - shift);
        added += s[i] + s[i + 1];
      }
      sum[row] = sum[row] * fade[row] + added;
    }
  }
  __device__ __forceinline__ void pack_powers() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
  }

  // Zeroes the values from kv_end to the end of its box: they are not the sequence's, and 0 * NaN is NaN.
  __device__ __forceinline__ void clear_values(int begin, int kv_end) {
    const int from = kv_end - begin, to = min(kKeys, (from + call.box_rows - 1) / call.box_rows * call.box_rows);
    if (from >= to || from < 0) return;
    constexpr int kPieces = kHeadDim / 8;
    char* tile = shared.v[v_ring.stage];
    for (int i = from * kPieces + thread; i < to * kPieces; i += kWarpgroup) {
      const int row = i / kPieces, piece = i % kPieces;
      *reinterpret_cast<int4*>(tile + piece / 8 * kHalfBytes + row * 128 + piece % 8 * 16) = make_int4(0, 0, 0, 0);
    }
    publish_shared();
    meet(kWithin + group, kWarpgroup);
  }

  __device__ __forceinline__ void attend(int steps, int begin, int kv_end) {
    const int stride = split ? 2 : 1;
    int step = steps - 1;
    if (split && group == 1) {
      leave_step();
      --step;
    }
    if (step >= 0) {
      float fade[2];
      wait_full(kKeysFull, k_ring);
      products_begin();
      multiply_keys();
      products_wait<0>();
      settle(s);
      release(kKeysFree, k_ring);
      mask(begin + step * kKeys);
      take_powers(fade);
      pack_powers();
      bool last = step == steps - 1;
      for (int next = step - stride; next >= 0; next -= stride) {
        wait_full(kValuesFull, v_ring);
        if (last) clear_values(begin + (steps - 1) * kKeys, kv_end);
        last = false;
        Ring v_now = v_ring;
        if (split) {
          v_ring.advance();
          leave_step();
        }
        wait_full(kKeysFull, k_ring);
        if (!split) meet(kTurn + group, kConsumers);
        settle(o);
        settle(p);
        products_begin();
        multiply_keys();
        Ring v_next = v_ring;
        v_ring = v_now;
        multiply_values();
        if (!split) pass(kTurn + 1 - group, kConsumers);
        products_wait<1>();
        settle(s);
        release(kKeysFree, k_ring);
        mask(begin + next * kKeys);
        take_powers(fade);
        finish(sum[0] + sum[1], scratch);  // while the values are multiplied, not after
        products_wait<0>();
        settle(o);
        release(kValuesFree, v_ring);
        if (split) v_ring = v_next;
#pragma unroll
        for (int i = 0; i < kOuts; ++i) o[i] *= fade[i / 2 % 2];
        pack_powers();
        step = next;
      }
      wait_full(kValuesFull, v_ring);
      if (last) clear_values(begin + (steps - 1) * kKeys, kv_end);
      settle(o);
      settle(p);
      products_begin();
      multiply_values();
      products_wait<0>();
      settle(o);
      release(kValuesFree, v_ring);
      if (split && step == 1) leave_step();
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] = quad_sum(sum[row]);
  }

  // Adds the second warpgroup's part to the first's, through the memory of the queries.
  __device__ __forceinline__ void merge() {
    float* outs = reinterpret_cast<float*>(shared.q[q_ring.stage]);
    const int row = thread / kWarp * 16 + lane / 4;
    meet(kBoth, kConsumers);
    if (group == 1) {
#pragma unroll
      for (int i = 0; i < kOuts; ++i) outs[i * kWarpgroup + thread] = o[i];
      if (lane % 4 == 0)
        for (int half = 0; half < 2; ++half) {
          shared.tops[row + half * 8] = top[half];
          shared.sums[row + half * 8] = sum[half];
        }
    }
    meet(kBoth, kConsumers);
    if (group == 1) return;
    float mine[2], other[2];
    for (int half = 0; half < 2; ++half) {
      const float their_top = shared.tops[row + half * 8], most = fmaxf(top[half], their_top);
      const float scale = call.call.scale_log2, shift = most == -INFINITY ? 0.0f : most * scale;
      mine[half] = exp2_fast(top[half] * scale - shift);
      other[half] = exp2_fast(their_top * scale - shift);
      sum[half] = sum[half] * mine[half] + shared.sums[row + half * 8] * other[half];
      top[half] = most;
    }
#pragma unroll
    for (int i = 0; i < kOuts; ++i) o[i] = o[i] * mine[i / 2 % 2] + outs[i * kWarpgroup + thread] * other[i / 2 % 2];
  }

  __device__ __forceinline__ void write(const int (&places)[2], bool partial) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (places[half] < 0) continue;
      const float inverse = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
      const int64_t begin = int64_t(places[half]) * kHeadDim + lane % 4 * 2;
      if (partial) {
        float* to = call.call.partial_out + begin;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j)
          *reinterpret_cast<float2*>(to + j * 8) = make_float2(o[j * 4 + half * 2] * inverse, o[j * 4 + half * 2 + 1] * inverse);
        if (lane % 4 == 0)
          call.call.partial_lse[places[half]] = sum[half] == 0.0f ? -INFINITY : top[half] * call.call.scale_log2 + log2f(sum[half]);
      } else {
        T* to = static_cast<T*>(call.call.out) + begin;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j)
          *reinterpret_cast<uint32_t*>(to + j * 8) = pack_pair<T>(o[j * 4 + half * 2] * inverse, o[j * 4 + half * 2 + 1] * inverse);
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (group == 1) pass(kTurn, kConsumers);
    while (true) {
      wait_full(kQueriesFull, q_ring);
      const Work& work = shared.work[q_ring.stage];
      const int rows = work.rows, window = call.call.window, kv_begin = work.kv_begin, kv_end = work.kv_end;
      if (rows == 0) return;
      split = rows <= kTileRows / 2;
      const int first_row = split ? 0 : group * (kTileRows / 2), pack = work.pack, q_position = work.q_position;
      const bool partial = work.partial;
      int places[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + thread / kWarp * 16 + half * 8 + lane / 4, position = q_position + row / pack;
        places[half] = row < rows ? work.places[row] : -1;
        low[half] = window > 0 ? max(kv_begin, position - window + 1) : kv_begin;
        high[half] = min(kv_end - 1, position);
        top[half] = -INFINITY;
        sum[half] = 0.0f;
      }
      const int last_position = q_position + (min(rows, first_row + kTileRows / 2) - 1) / pack;
      clear_low = window > 0 ? max(kv_begin, last_position - window + 1) : kv_begin;
      clear_high = min(kv_end - 1, q_position + first_row / pack);
      q_operand = describe(shared_address(shared.q[q_ring.stage]) + first_row * 128, 0);
#pragma unroll
      for (int i = 0; i < kOuts; ++i) o[i] = 0.0f;
      attend(steps_of(kv_begin, kv_end, call.box_rows), kv_begin / call.box_rows * call.box_rows, kv_end);
      if (split) merge();
      release(kQueriesFree, q_ring);
      if (!split || group == 0) write(places, partial);
    }
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    tile_attention_wgmma_kernel(const Call call, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  Shared<kHeadDim>& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw + (-shared_address(raw) & (kAtomBytes - 1)));
  const uint32_t barriers = shared_address(shared.barriers);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(barriers + 8 * (kKeysFull + stage), 1);
      barrier_init(barriers + 8 * (kValuesFull + stage), 1);
      barrier_init(barriers + 8 * (kKeysFree + stage), kConsumers / kWarp);
      barrier_init(barriers + 8 * (kValuesFree + stage), kConsumers / kWarp);
      barrier_init(barriers + 8 * (kQueriesFull + stage), kGatherers);
      barrier_init(barriers + 8 * (kQueriesFree + stage), kConsumers / kWarp);
    }
    barrier_init_done();
    prefetch_map(&k_map);
    prefetch_map(&v_map);
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
  if (threadIdx.x < kWarpgroup) {
    give_registers<40>();
    if (threadIdx.x < kWarp)
      copy_keys_and_values<kHeadDim>(call, &k_map, &v_map, shared, barriers);
    else
      gather_queries<T, kHeadDim>(call.call, shared, barriers);
  } else {
    take_registers<232>();
    Consumer<T, kHeadDim>(call, shared, barriers).run();
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
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result), "tile_attention");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result), "tile_attention");
#endif
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

CUtensorMap describe_cache(const TileAttention& call, const void* cache, int box_rows) {
  CUtensorMap map;
  const auto type = call.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[] = {cuuint64_t(call.head_dim), cuuint64_t(call.block_size), cuuint64_t(call.num_kv_heads),
                              cuuint64_t(call.num_blocks)};
  const cuuint64_t strides[] = {cuuint64_t(call.head_dim) * 2, cuuint64_t(call.head_stride) * 2, cuuint64_t(call.block_stride) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows), 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result = find_encode_tiled()(&map, type, 4, const_cast<void*>(cache), sizes, strides, box, steps,
                                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("tile_attention: the cache cannot be described to the copy engine");
  return map;
}

}  // namespace

bool tile_attention_wgmma_takes(const TileAttention& call) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 && call.num_blocks > 0 && call.num_tiles > 0;
}

void tile_attention_wgmma(const TileAttention& call, cudaStream_t stream) {
  int box_rows = 16;  // the largest power of two that divides a block
  while (box_rows < kKeys && call.block_size % (2 * box_rows) == 0) box_rows *= 2;
  const CUtensorMap k_map = describe_cache(call, call.k_cache, box_rows), v_map = describe_cache(call, call.v_cache, box_rows);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(num_multiprocessors(), int64_t(call.num_tiles) * call.num_heads)));
  dispatch_half(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto run = [&]<int kHeadDim>() {
      launch("tile_attention", tile_attention_wgmma_kernel<T, kHeadDim>, grid, dim3(kThreads), sizeof(Shared<kHeadDim>) + kAtomBytes,
             stream, Call{call, box_rows, kKeys / box_rows}, k_map, v_map);
    };
    call.head_dim == 64 ? run.template operator()<64>() : run.template operator()<128>();
  });
}

}  // namespace batchinfer
