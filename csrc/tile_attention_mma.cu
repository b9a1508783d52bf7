// Tile attention on the tensor cores of every architecture, through mma.sync: the algorithm of FlashAttention-2 (Dao, 2023)
// over a paged cache.
//
// A block of four warps holds one item under one query head, or several heads of a small item (TileShape), and goes over its
// keys 64 at a time. Keys are fetched while the values before them are multiplied, values while the scores are computed. Warps
// share the rows: 32 each, or 16. With at most 16 rows they share the keys instead, and add up at the end.
#include "common/launch.h"
#include "tile_attention.cuh"

namespace batchinfer {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kKeys = 64;  // of one step

template <int kHeadDim>
constexpr int kSharedBytes = (kTileRows + 2 * kKeys) * kHeadDim * 2;

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where 16-byte piece `piece` of row `row` lies in a tile: mixed so that eight rows of a column lie in eight banks.
template <int kHeadDim>
__device__ __forceinline__ uint32_t place(uint32_t tile, int row, int piece) {
  return tile + row * (kHeadDim * 2) + ((piece ^ (row & 7)) << 4);
}

// Fetches the keys or values of positions `begin` to begin + kKeys. What lies from kv_end on becomes 0: it is not the sequence's,
// and masked places are still multiplied with 0, and 0 * NaN is NaN.
template <typename T, int kHeadDim>
__device__ __forceinline__ void fetch(uint32_t tile, const T* cache, const TileAttention& call, const int* table,
                                      uint32_t inverse, int begin, int kv_end) {
  constexpr int kPieces = kHeadDim / 8, kRows = kThreads / kPieces;
  const int piece = threadIdx.x % kPieces;
#pragma unroll
  for (int row = threadIdx.x / kPieces; row < kKeys; row += kRows) {
    const int position = begin + row;
    const bool wanted = position < kv_end;
    const int index = __umulhi(position, inverse);  // position / block_size
    const int64_t block = wanted ? table[index] : 0;
    const T* from = cache + block * call.block_stride + (position - index * call.block_size) * kHeadDim + piece * 8;
    copy_async(place<kHeadDim>(tile, row, piece), wanted ? from : cache, wanted);
  }
}

template <typename T, int kHeadDim>
struct Tile {
  const TileAttention& call;
  const TileItem& item;
  const TileShape& shape;
  uint32_t q, k, v;  // shared memory
  char* shared;

  __device__ __forceinline__ void write(int row, int column, float o0, float o1) const {
    const int query = row / shape.pack, head = shape.first_head + row % shape.pack;
    if (item.slot < 0) {
      const int64_t token = call.tile_rows[item.q_begin + query];
      T* to = static_cast<T*>(call.out) + (token * call.num_heads + head) * kHeadDim + column;
      *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(o0, o1);
    } else {
      const int64_t place = int64_t(item.slot + query) * call.num_heads + head;
      *reinterpret_cast<float2*>(call.partial_out + place * kHeadDim + column) = make_float2(o0, o1);
    }
  }
  __device__ __forceinline__ void write_lse(int row, float lse) const {
    if (item.slot < 0) return;
    const int query = row / shape.pack, head = shape.first_head + row % shape.pack;
    call.partial_lse[int64_t(item.slot + query) * call.num_heads + head] = lse;
  }
};

// kStrips: of 16 rows each that a warp holds. kSplitKeys: the warps hold the same 16 rows and different keys.
template <typename T, int kHeadDim, int kStrips, bool kSplitKeys>
__device__ __forceinline__ void attend(const Tile<T, kHeadDim>& tile) {
  constexpr int kKeyTiles = (kSplitKeys ? kKeys / kWarps : kKeys) / 8, kOutTiles = kHeadDim / 8, kDepth = kHeadDim / 16;
  const TileAttention& call = tile.call;
  const TileItem& item = tile.item;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_row = kSplitKeys ? 0 : warp * kStrips * 16;
  const int first_key = kSplitKeys ? warp * (kKeys / kWarps) : 0;
  const int* table = call.block_tables + int64_t(item.sequence) * call.table_stride;
  const uint32_t inverse = 0xffffffffu / call.block_size + 1;  // exact while positions times block_size stay below 2^32
  const int64_t head_offset = tile.shape.kv_head * call.head_stride;
  const T* keys = static_cast<const T*>(call.k_cache) + head_offset;
  const T* values = static_cast<const T*>(call.v_cache) + head_offset;

  float o[kStrips][kOutTiles][4] = {}, top[kStrips][2], sum[kStrips][2];
  int low[kStrips][2], high[kStrips][2];  // the first and last position that each row sees
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = item.q_position + (first_row + strip * 16 + half * 8 + lane / 4) / tile.shape.pack;
      low[strip][half] = call.window > 0 ? max(item.kv_begin, position - call.window + 1) : item.kv_begin;
      high[strip][half] = min(item.kv_end - 1, position);
      top[strip][half] = -INFINITY;
      sum[strip][half] = 0.0f;
    }
  const int last_row = item.q_position + (tile.shape.rows - 1) / tile.shape.pack;
  const int clear_low = call.window > 0 ? last_row - call.window + 1 : item.kv_begin;  // all rows see positions from here ...
  const int clear_high = min(item.kv_end - 1, item.q_position);                        // ... up to here

  fetch<T, kHeadDim>(tile.k, keys, call, table, inverse, item.kv_begin, item.kv_end);
  copy_async_commit();
  for (int begin = item.kv_begin; begin < item.kv_end; begin += kKeys) {
    fetch<T, kHeadDim>(tile.v, values, call, table, inverse, begin, item.kv_end);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();

    float s[kStrips][kKeyTiles][4] = {};
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip)
        load_matrices(a[strip], place<kHeadDim>(tile.q, first_row + strip * 16 + lane % 16, depth * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t b[4];
        load_matrices(b, place<kHeadDim>(tile.k, first_key + j * 8 + lane / 16 * 8 + lane % 8, depth * 2 + lane / 8 % 2));
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          multiply<T>(s[strip][j], a[strip], b[0], b[1]);
          multiply<T>(s[strip][j + 1], a[strip], b[2], b[3]);
        }
      }
    }
    __syncthreads();
    if (begin + kKeys < item.kv_end) fetch<T, kHeadDim>(tile.k, keys, call, table, inverse, begin + kKeys, item.kv_end);
    copy_async_commit();

    if (begin < clear_low || begin + kKeys - 1 > clear_high) {
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int position = begin + first_key + j * 8 + lane % 4 * 2 + e % 2;
            if (position < low[strip][e / 2] || position > high[strip][e / 2]) s[strip][j][e] = -INFINITY;
          }
    }
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[strip][half];
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) most = fmaxf(most, fmaxf(s[strip][j][half * 2], s[strip][j][half * 2 + 1]));
        most = quad_max(most);
        const float shift = most == -INFINITY ? 0.0f : most * call.scale_log2;
        const float fade = exp2_fast(top[strip][half] * call.scale_log2 - shift);
        top[strip][half] = most;
        float added = 0.0f;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[strip][j][e] = exp2_fast(s[strip][j][e] * call.scale_log2 - shift);
            added += s[strip][j][e];
          }
        sum[strip][half] = sum[strip][half] * fade + added;
#pragma unroll
        for (int j = 0; j < kOutTiles; ++j) {
          o[strip][j][half * 2] *= fade;
          o[strip][j][half * 2 + 1] *= fade;
        }
      }
    copy_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kKeyTiles / 2; ++depth) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const float* pair = &s[strip][depth * 2 + part / 2][part % 2 * 2];
          a[strip][part] = pack_pair<T>(pair[0], pair[1]);
        }
#pragma unroll
      for (int j = 0; j < kOutTiles; j += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, place<kHeadDim>(tile.v, first_key + depth * 16 + lane % 16, j + lane / 16));
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          multiply<T>(o[strip][j], a[strip], b[0], b[1]);
          multiply<T>(o[strip][j + 1], a[strip], b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }
  copy_async_wait<0>();

  if constexpr (kSplitKeys) {  // bring the warps' sums under one maximum, and add them up in shared memory
    float* outs = reinterpret_cast<float*>(tile.shared);                        // [kWarps, 16, kHeadDim], over keys and values
    float* tops = outs + kWarps * 16 * kHeadDim;                                // [kWarps, 16], over q
    float* sums = tops + kWarps * 16;
    const int row = lane / 4;
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (lane % 4 == 0) tops[warp * 16 + row + half * 8] = top[0][half];
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) most = fmaxf(most, tops[other * 16 + row + half * 8]);
      const float shift = most == -INFINITY ? 0.0f : most * call.scale_log2;
      const float fade = exp2_fast(top[0][half] * call.scale_log2 - shift);
      const float all = quad_sum(sum[0][half]) * fade;
      if (lane % 4 == 0) sums[warp * 16 + row + half * 8] = all;
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j)
        *reinterpret_cast<float2*>(outs + (warp * 16 + row + half * 8) * kHeadDim + j * 8 + lane % 4 * 2) =
            make_float2(o[0][j][half * 2] * fade, o[0][j][half * 2 + 1] * fade);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.shape.rows * (kHeadDim / 2); i += kThreads) {
      const int r = i / (kHeadDim / 2), column = i % (kHeadDim / 2) * 2;
      float most = -INFINITY, all = 0.0f, o0 = 0.0f, o1 = 0.0f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) {
        most = fmaxf(most, tops[other * 16 + r]);
        all += sums[other * 16 + r];
        o0 += outs[(other * 16 + r) * kHeadDim + column];
        o1 += outs[(other * 16 + r) * kHeadDim + column + 1];
      }
      const float inverse = all == 0.0f ? 0.0f : 1.0f / all;
      tile.write(r, column, o0 * inverse, o1 * inverse);
      if (column == 0) tile.write_lse(r, all == 0.0f ? -INFINITY : most * call.scale_log2 + log2f(all));
    }
  } else {
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + strip * 16 + half * 8 + lane / 4;
        const float all = quad_sum(sum[strip][half]);
        const float inverse = all == 0.0f ? 0.0f : 1.0f / all;
        if (row >= tile.shape.rows) continue;
        if (lane % 4 == 0) tile.write_lse(row, all == 0.0f ? -INFINITY : top[strip][half] * call.scale_log2 + log2f(all));
#pragma unroll
        for (int j = 0; j < kOutTiles; ++j)
          tile.write(row, j * 8 + lane % 4 * 2, o[strip][j][half * 2] * inverse, o[strip][j][half * 2 + 1] * inverse);
      }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) tile_attention_mma_kernel(const TileAttention call) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kPieces = kHeadDim / 8;
  wait_for_previous();
  let_next_start();
  const TileItem item = call.tiles[blockIdx.x / call.num_heads];
  if (item.q_count <= 0) return;
  const TileShape shape(item.q_count, blockIdx.x % call.num_heads, call.num_heads, call.num_kv_heads);
  if (shape.first_head >= call.num_heads) return;

  Tile<T, kHeadDim> tile{call, item, shape};
  tile.shared = shared;  // keys, values, q
  tile.k = shared_address(shared);
  tile.v = tile.k + kKeys * kHeadDim * 2;
  tile.q = tile.v + kKeys * kHeadDim * 2;
  for (int i = threadIdx.x; i < (shape.rows + 15) / 16 * 16 * kPieces; i += kThreads) {
    const int row = i / kPieces, query = row / shape.pack;
    const bool wanted = row < shape.rows;
    const int64_t token = wanted ? call.tile_rows[item.q_begin + query] : 0;
    const T* from = static_cast<const T*>(call.q) + token * call.q_stride;
    if (wanted) from += (shape.first_head + row % shape.pack) * kHeadDim + i % kPieces * 8;
    copy_async(place<kHeadDim>(tile.q, row, i % kPieces), from, wanted);
  }
  if (shape.rows <= 16) return attend<T, kHeadDim, 1, true>(tile);
  if (shape.rows <= 64) return attend<T, kHeadDim, 1, false>(tile);
  attend<T, kHeadDim, 2, false>(tile);
}

}  // namespace

void tile_attention_mma(const TileAttention& call, cudaStream_t stream) {
  dispatch_half(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>(call.num_tiles) * call.num_heads);
    auto run = [&]<int kHeadDim>() {
      constexpr int kBytes = kSharedBytes<kHeadDim>;
      launch("tile_attention", tile_attention_mma_kernel<T, kHeadDim>, grid, dim3(kThreads), kBytes, stream, call);
    };
    call.head_dim == 64 ? run.template operator()<64>() : run.template operator()<128>();
  });
}

}  // namespace batchinfer
