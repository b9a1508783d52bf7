// Decode attention: bound by reading keys and values once. No shared memory on the way: a warp takes 16 tokens of one KV head,
// which lie together in the cache, loads them 16 bytes a lane straight into the registers from which tensor cores multiply, and
// has the next 16 tokens on the way while it computes. Keys and values are the large operand A (16 rows), the query heads that
// share them the small operand B (8 columns): S^T = K Q^T, then O^T = V^T P^T.
//
// Which contraction index is which dimension or token is free, so a lane's 16 bytes are its fragments as they come:
// - keys: row g is token g (and g + 8), and k-steps 2i and 2i + 1 are the dimensions 32i + 8t .. 32i + 8t + 7 of lane t;
// - values: lane (g, t) holds the dimensions 64c + 8g .. + 7 of tokens 2t, 2t+1, 2t+8, 2t+9; rows g and g + 8 of tile 4c + j are the
//   dimensions 64c + 8g + 2j and the one after, and pairs of tokens are put together by byte permutations.
//
// With few query heads per KV head (kHeads < 8) the columns of B would be mostly padding, and accumulators with them. Instead
// kReplicas = 8 / kHeads tiles share one accumulator: tile i multiplies only the columns of replica i % kReplicas, the others
// of its B are zero. So scores come as sums over replicas, and outputs of a tile lie in the columns of its replica.
//
// The softmax is online (Milakov and Gimelshein 2018) per warp, split over the context as in Flash-Decoding (Dao et al. 2023);
// the warps of a block merge at the end of each segment in shared memory, and the blocks of a cluster in each other's.
#include "decode_attention.h"

#include "common/cluster.cuh"
#include "common/device.cuh"
#include "common/fragments.cuh"
#include "common/launch.h"

namespace batchinfer {
namespace {

constexpr int kTokens = 16;  // of a chunk: what a warp takes at once
constexpr int kSegmentFields = 8;
constexpr int kLine = 128;  // bytes that are prefetched at once
constexpr float kLog2E = 1.4426950408889634f;

constexpr int kWarpsAtOnce = 16;  // on a multiprocessor, as registers allow
template <int kHeads>
constexpr int kMaxWarps = kHeads <= 4 ? kWarpsAtOnce : kHeads == 8 ? 12 : 8;

struct Segment {
  int row, sequence, begin, end, slot;

  __device__ __forceinline__ static Segment load(const int* segments, int index) {
    const int4* from = reinterpret_cast<const int4*>(segments + int64_t(index) * kSegmentFields);
    const int4 head = from[0];
    return {head.x, head.y, head.z, head.w, reinterpret_cast<const int*>(from + 1)[0]};
  }
  __device__ __forceinline__ int first_chunk() const { return begin / kTokens; }
  __device__ __forceinline__ int end_chunk() const { return (end + kTokens - 1) / kTokens; }
};

__device__ __forceinline__ int block_of(const DecodeAttention& a, int chunk) {
  return a.block_size == kTokens ? chunk : chunk * kTokens / a.block_size;
}
__device__ __forceinline__ int token_in_block(const DecodeAttention& a, int chunk) {
  return a.block_size == kTokens ? 0 : chunk * kTokens % a.block_size;
}

// While the previous kernel still runs: brings the first keys and values of this warp into L2. Only a hint, for what is read here
// may not be there yet; so it is not trusted to lie in range, and read past L1, which would keep it.
template <typename T, int kDim>
__device__ __forceinline__ void look_ahead(const DecodeAttention& a, const T* k_cache, const T* v_cache, int part, int turn, int lane) {
  const int index = load_racing(a.part_indptr + part);
  if (index < 0 || index >= a.num_segments) return;
  const int* segment = a.segments + int64_t(index) * kSegmentFields;
  const int sequence = load_racing(segment + 1), begin = load_racing(segment + 2), end = load_racing(segment + 3);
  const int chunk = begin / kTokens + turn;
  if (chunk < 0 || chunk >= (end + kTokens - 1) / kTokens) return;
  if (sequence < 0 || sequence >= a.num_tables || block_of(a, chunk) >= a.table_width) return;
  const int64_t block = load_racing(a.block_tables + sequence * a.table_stride + block_of(a, chunk));
  if (block < 0 || block >= a.num_blocks || lane * kLine >= kTokens * kDim * int(sizeof(T))) return;
  const int64_t element = token_in_block(a, chunk) * kDim + lane * (kLine / int(sizeof(T)));
  prefetch(k_cache + block * a.k_block_stride + element);
  prefetch(v_cache + block * a.v_block_stride + element);
}

// Walks the chunks that one warp is to load, through all segments of its part, with the block id of the current one on the way.
struct Cursor {
  const DecodeAttention& a;
  int segment, last_segment, chunk = 0, end = 0, turn, turns, block = 0;
  const int* table = nullptr;

  __device__ __forceinline__ void open() {
    for (; segment < last_segment; ++segment) {
      const Segment s = Segment::load(a.segments, segment);
      chunk = s.first_chunk() + turn, end = s.end_chunk();
      table = a.block_tables + s.sequence * a.table_stride;
      if (chunk < end) return fetch();
    }
  }
  __device__ __forceinline__ void advance() {
    chunk += turns;
    if (chunk < end) return fetch();
    ++segment;
    open();
  }
  __device__ __forceinline__ void fetch() { block = table[block_of(a, chunk)]; }
  __device__ __forceinline__ bool valid() const { return segment < last_segment; }
};

template <typename T, int kDim, int kHeads>
struct Warp {
  static constexpr int kSteps = kDim / 16;
  static constexpr int kReplicas = kHeads < 8 ? 8 / kHeads : 1;
  static constexpr int kColumnTiles = kHeads <= 8 ? 1 : kHeads / 8;
  static constexpr int kShared = kSteps / kReplicas;  // accumulators of a column tile
  static constexpr int kDistinct = kHeads == 1 ? 1 : 2;  // columns of a lane that can differ
  static_assert(kShared >= 1 && kSteps % kReplicas == 0);

  int g, t;
  uint32_t k[2][kDim / 32][4], v[4][kDim / 64][4];
  uint32_t q[kColumnTiles][kShared][2];
  float o[kColumnTiles][kShared][4];
  float maximum[kColumnTiles][2], sum[kColumnTiles][2];

  __device__ __forceinline__ explicit Warp(int lane) : g(lane / 4), t(lane % 4) {}

  // `tokens`: the first of 16 tokens of one KV head.
  __device__ __forceinline__ void load_keys(const T* tokens) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) load_streaming(k[half][i], tokens + (g + 8 * half) * kDim + 32 * i + 8 * t);
  }
  __device__ __forceinline__ void load_values(const T* tokens) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < kDim / 64; ++c)
        load_streaming(v[i][c], tokens + value_token(i) * kDim + 64 * c + 8 * g);
  }
  __device__ __forceinline__ int value_token(int i) const { return 2 * t + i % 2 + i / 2 * 8; }

  // B is zero but for the columns of the tile's replica.
  __device__ __forceinline__ uint32_t of_replica(uint32_t b, int tile) const {
    return kReplicas == 1 || g / kHeads == tile % kReplicas ? b : 0u;
  }

  // `heads`: the first of `group` query heads, beside each other; columns beyond them are zero.
  __device__ __forceinline__ void begin_segment(const T* heads, int group) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int head = kHeads < 8 ? g % kHeads : 8 * n + g;
#pragma unroll
      for (int i = 0; i < kShared; ++i) {
        const int step = kReplicas == 1 ? i : i * kReplicas + g / kHeads;
        const T* from = heads + head * kDim + step / 2 * 32 + 8 * t + step % 2 * 4;
        const uint2 pair = head < group ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
        q[n][i][0] = pair.x, q[n][i][1] = pair.y;
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][i][e] = 0.0f;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) maximum[n][e] = -INFINITY, sum[n][e] = 0.0f;
    }
  }

  // Scores of the chunk: s[n][e], e = 0, 1 of token g, 2, 3 of token g + 8; columns 2t and 2t + 1 of column tile n.
  __device__ __forceinline__ void multiply_keys(float (&s)[kColumnTiles][4], float scale) const {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t(&low)[4] = k[0][step / 2], (&high)[4] = k[1][step / 2];
        const int first = step % 2 * 2;
        const uint32_t(&b)[2] = q[n][step / kReplicas];
        multiply_add<T>(s[n], low[first], high[first], low[first + 1], high[first + 1], of_replica(b[0], step),
                        of_replica(b[1], step));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = over_replicas(s[n][e]) * scale;
      if constexpr (kHeads == 1) s[n][0] = s[n][1] = s[n][0] + s[n][1], s[n][2] = s[n][3] = s[n][2] + s[n][3];
    }
  }
  // Column c = replica * kHeads + head lies with lane t = c / 2.
  __device__ __forceinline__ float over_replicas(float x) const {
    if constexpr (kHeads <= 2) x += __shfl_xor_sync(kAllLanes, x, 1);
    if constexpr (kHeads <= 4) x += __shfl_xor_sync(kAllLanes, x, 2);
    return x;
  }

  // Tokens before `begin` or from `end` on (counted from the chunk's first) are not there: 0 * NaN is NaN, so values too.
  __device__ __forceinline__ void mask_scores(float (&s)[kColumnTiles][4], int begin, int end) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = g + e / 2 * 8;
      if (token >= begin && token < end) continue;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) s[n][e] = -INFINITY;
    }
  }
  __device__ __forceinline__ void mask_values(int begin, int end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (value_token(i) >= begin && value_token(i) < end) continue;
#pragma unroll
      for (int c = 0; c < kDim / 64; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][c][j] = 0u;
    }
  }

  // Scores become weights 2^(s - maximum), and what was summed under an older maximum is scaled to the new one.
  __device__ __forceinline__ void soften(float (&s)[kColumnTiles][4]) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      float factor[2];
#pragma unroll
      for (int e = 0; e < kDistinct; ++e) {
        float m = fmaxf(s[n][e], s[n][e + 2]);
#pragma unroll
        for (int lanes = 4; lanes < kWarp; lanes *= 2) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, lanes));
        m = fmaxf(m, maximum[n][e]);
        factor[e] = exp2f(maximum[n][e] - m);
        maximum[n][e] = m;
        s[n][e] = exp2f(s[n][e] - m), s[n][e + 2] = exp2f(s[n][e + 2] - m);
        sum[n][e] = sum[n][e] * factor[e] + s[n][e] + s[n][e + 2];
      }
      if constexpr (kDistinct == 1) factor[1] = factor[0], s[n][1] = s[n][0], s[n][3] = s[n][2];
#pragma unroll
      for (int i = 0; i < kShared; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][i][e] *= factor[e % 2];
    }
  }

  __device__ __forceinline__ void multiply_values(const float (&weights)[kColumnTiles][4]) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const uint32_t b0 = transpose_8x8(pack<T>(weights[n][0], weights[n][1]));
      const uint32_t b1 = transpose_8x8(pack<T>(weights[n][2], weights[n][3]));
#pragma unroll
      for (int tile = 0; tile < kSteps; ++tile) {
        const int c = tile / 4, j = tile % 4;
        multiply_add<T>(o[n][tile / kReplicas], low_halves(v[0][c][j], v[1][c][j]), high_halves(v[0][c][j], v[1][c][j]),
                        low_halves(v[2][c][j], v[3][c][j]), high_halves(v[2][c][j], v[3][c][j]), of_replica(b0, tile),
                        of_replica(b1, tile));
      }
    }
  }

  // Puts what the warp has into out [kHeads, kDim] and statistics [kHeads][maximum, sum], both its own.
  __device__ __forceinline__ void store(float* out, float2* statistics) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 2 * t + e, head = kHeads < 8 ? column % kHeads : 8 * n + column;
        const int replica = kHeads < 8 ? column / kHeads : 0, from = e % kDistinct;
        float total = sum[n][from];
#pragma unroll
        for (int lanes = 4; lanes < kWarp; lanes *= 2) total += __shfl_xor_sync(kAllLanes, total, lanes);
        if (g == 0 && replica == 0) statistics[head] = {maximum[n][from], total};
#pragma unroll
        for (int i = 0; i < kShared; ++i) {
          const int tile = i * kReplicas + replica;
          *reinterpret_cast<float2*>(out + head * kDim + tile / 4 * 64 + 8 * g + tile % 4 * 2) = {o[n][i][e], o[n][i][e + 2]};
        }
      }
  }
};

// Four or two floats as elements, stored at once.
template <typename T, int kSize>
__device__ __forceinline__ void store_row(T* to, const float (&x)[kSize]) {
  struct alignas(kSize * sizeof(T)) Row {
    T values[kSize];
  } row;
#pragma unroll
  for (int i = 0; i < kSize; ++i) row.values[i] = from_float<T>(x[i]);
  *reinterpret_cast<Row*>(to) = row;
}

// One head of one row, from several partial results: the sum of weighted values and of weights, under their largest score.
template <int kEach>
struct Merged {
  float x[kEach];  // of the lane's dimensions
  float maximum, sum;

  // `statistics(i)` gives (maximum, sum) of part i, `output(i)` what it summed, of the lane's dimensions; at most 32 parts.
  template <typename Statistics, typename Output>
  __device__ __forceinline__ static Merged of(int parts, Statistics&& statistics, Output&& output) {
    const int lane = threadIdx.x % kWarp;
    const float2 mine = lane < parts ? statistics(lane) : float2{-INFINITY, 0.0f};
    Merged merged{.x = {}, .maximum = warp_max(mine.x)};
    const float factor = mine.y == 0.0f ? 0.0f : exp2f(mine.x - merged.maximum);  // 0: a part without tokens, which wrote nothing
    merged.sum = warp_sum(factor * mine.y);
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const float f = __shfl_sync(kAllLanes, factor, part);
      const Floats<kEach> y = output(part);
#pragma unroll
      for (int i = 0; i < kEach; ++i) merged.x[i] += f == 0.0f ? 0.0f : f * y.values[i];
    }
    return merged;
  }
};

// Writes a head's result to `out` or, as a partial one, to its slot.
template <typename T, int kDim>
__device__ __forceinline__ void finish(const DecodeAttention& a, Merged<kDim / kWarp> y, int64_t row, int slot, int head) {
  constexpr int kEach = kDim / kWarp;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kEach; ++i) y.x[i] = y.sum == 0.0f ? 0.0f : y.x[i] / y.sum;
  if (slot < 0) return store_row(static_cast<T*>(a.out) + (row * a.num_heads + head) * kDim + lane * kEach, y.x);
  const int64_t place = int64_t(slot) * a.num_heads + head;
  store_row(a.partial_out + place * kDim + lane * kEach, y.x);
  if (lane == 0) a.partial_lse[place] = y.sum == 0.0f ? -INFINITY : y.maximum + log2f(y.sum);
}

// Shared memory of a block: what its warps have, and what they have together.
template <int kDim, int kHeads>
struct Results {
  static constexpr int kOut = kHeads * kDim, kEach = kDim / kWarp;
  float *outs, *statistics;  // [warps + 1][kHeads][kDim], [warps + 1][kHeads][maximum, sum]; last: together

  __device__ __forceinline__ Results(float* shared, int warps) : outs(shared), statistics(shared + (warps + 1) * kOut) {}
  static constexpr size_t bytes(int warps) { return (warps + 1) * (kOut + 2 * kHeads) * sizeof(float); }

  __device__ __forceinline__ float* out(int warp) { return outs + warp * kOut; }
  __device__ __forceinline__ Floats<kEach>* row(int warp, int head) {
    return reinterpret_cast<Floats<kEach>*>(out(warp) + head * kDim) + threadIdx.x % kWarp;
  }
  __device__ __forceinline__ float2* statistic(int warp) { return reinterpret_cast<float2*>(statistics) + warp * kHeads; }

  __device__ __forceinline__ Merged<kEach> merge_warps(int head, int warps) {
    return Merged<kEach>::of(
        warps, [&](int warp) { return statistic(warp)[head]; }, [&](int warp) { return *row(warp, head); });
  }
  __device__ __forceinline__ void put_together(int head, int warps, const Merged<kEach>& y) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) row(warps, head)->values[i] = y.x[i];
    if (threadIdx.x % kWarp == 0) statistic(warps)[head] = {y.maximum, y.sum};
  }
  __device__ __forceinline__ Merged<kEach> merge_blocks(int head, int warps, int ranks) {
    const auto* numbers = reinterpret_cast<const Floats<2>*>(statistic(warps) + head);
    const auto statistics = [&](int rank) {
      const Floats<2> both = load_remote(numbers, rank);
      return float2{both.values[0], both.values[1]};
    };
    return Merged<kEach>::of(ranks, statistics, [&](int rank) { return load_remote(row(warps, head), rank); });
  }
};

// Grid: (KV heads, parts * ranks), so that the heads of a part, whose tokens lie beside each other, run at the same time. The
// warps of a part are those of `ranks` blocks, a cluster; they take its chunks in turn.
template <typename T, int kDim, int kHeads>
__global__ void __launch_bounds__(kMaxWarps<kHeads>* kWarp, 1) decode_attention_kernel(const __grid_constant__ DecodeAttention a) {
  extern __shared__ float4 shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int part = blockIdx.y / a.ranks, rank = blockIdx.y % a.ranks, turn = rank * warps + warp, turns = a.ranks * warps;
  const int kv_head = blockIdx.x, group = a.num_heads / a.num_kv_heads, first_head = kv_head * group;
  const T* k_cache = static_cast<const T*>(a.k_cache) + kv_head * a.k_head_stride;
  const T* v_cache = static_cast<const T*>(a.v_cache) + kv_head * a.v_head_stride;
  const float scale = a.scale * kLog2E;
  Results<kDim, kHeads> results(reinterpret_cast<float*>(shared), warps);

  if (a.look_ahead) look_ahead<T, kDim>(a, k_cache, v_cache, part, turn, lane);
  wait_for_previous();
  let_next_start();
  int segment = a.part_indptr[part];
  const int last_segment = a.part_indptr[part + 1];
  Cursor next{.a = a, .segment = segment, .last_segment = last_segment, .turn = turn, .turns = turns};
  Warp<T, kDim, kHeads> w(lane);
  next.open();
  if (next.valid()) {
    w.load_keys(k_cache + next.block * a.k_block_stride + token_in_block(a, next.chunk) * kDim);
    w.load_values(v_cache + next.block * a.v_block_stride + token_in_block(a, next.chunk) * kDim);
    next.advance();
  }
  for (; segment < last_segment; ++segment) {
    const Segment s = Segment::load(a.segments, segment);
    w.begin_segment(static_cast<const T*>(a.q) + s.row * a.q_stride + first_head * kDim, group);
    for (int chunk = s.first_chunk() + turn; chunk < s.end_chunk(); chunk += turns) {
      const int begin = s.begin - chunk * kTokens, end = s.end - chunk * kTokens;
      const bool partly = begin > 0 || end < kTokens, more = next.valid();
      const int token = token_in_block(a, next.chunk);
      float scores[w.kColumnTiles][4];
      w.multiply_keys(scores, scale);
      if (more) w.load_keys(k_cache + next.block * a.k_block_stride + token * kDim);
      if (partly) w.mask_scores(scores, begin, end);
      w.soften(scores);
      if (partly) w.mask_values(begin, end);
      w.multiply_values(scores);
      if (more) {
        w.load_values(v_cache + next.block * a.v_block_stride + token * kDim);
        next.advance();
      }
    }
    __syncthreads();  // the previous segment has been merged
    w.store(results.out(warp), results.statistic(warp));
    __syncthreads();
    for (int head = warp; head < group; head += warps) {
      const auto merged = results.merge_warps(head, warps);
      a.ranks > 1 ? results.put_together(head, warps, merged) : finish<T, kDim>(a, merged, s.row, s.slot, first_head + head);
    }
    if (a.ranks == 1) continue;
    cluster_barrier();
    for (int head = turn; head < group; head += turns)
      finish<T, kDim>(a, results.merge_blocks(head, warps, a.ranks), s.row, s.slot, first_head + head);
    cluster_barrier();  // nobody writes anew, or leaves, while others read
  }
}

template <typename T, int kDim, int kHeads>
void launch_decode(DecodeAttention a, int warps, cudaStream_t stream) {
  warps = warps < kMaxWarps<kHeads> ? warps : kMaxWarps<kHeads>;
  if (!is_hopper_or_later()) a.ranks = 1;
  const dim3 grid(a.num_kv_heads, a.num_parts * a.ranks), block(warps * kWarp);
  // Where all blocks start at once; later ones would find nothing to wait for.
  a.look_ahead = grid.x * grid.y * warps <= unsigned(kWarpsAtOnce * num_multiprocessors());
  launch_clusters("decode_attention", decode_attention_kernel<T, kDim, kHeads>, grid, block, a.ranks,
                  Results<kDim, kHeads>::bytes(warps), stream, a);
}

template <typename T, int kDim>
void launch_decode(const DecodeAttention& a, int warps, cudaStream_t stream) {
  const int group = a.num_heads / a.num_kv_heads;
  if constexpr (kDim == 128)
    if (group == 1) return launch_decode<T, kDim, 1>(a, warps, stream);
  if (group <= 2) return launch_decode<T, kDim, 2>(a, warps, stream);
  if (group <= 4) return launch_decode<T, kDim, 4>(a, warps, stream);
  if (group <= 8) return launch_decode<T, kDim, 8>(a, warps, stream);
  return launch_decode<T, kDim, 16>(a, warps, stream);
}

constexpr int kCombineWarps = 4;

// Grid: (groups of query heads, rows); a warp merges one head of one row.
template <typename T, int kDim>
__global__ void __launch_bounds__(kCombineWarps* kWarp) combine_attention_kernel(const __grid_constant__ CombineAttention a) {
  constexpr int kEach = kDim / kWarp;
  const int lane = threadIdx.x % kWarp, head = blockIdx.x * kCombineWarps + threadIdx.x / kWarp;
  wait_for_previous();
  let_next_start();
  const int64_t row = a.rows[blockIdx.y];
  if (row < 0 || head >= a.num_heads) return;
  const int begin = a.indptr[blockIdx.y], end = a.indptr[blockIdx.y + 1];
  float maximum = -INFINITY, total = 0.0f, x[kEach] = {};
  for (int first = begin; first < end; first += kWarp) {
    const int64_t mine = first + lane < end ? int64_t(a.slots[first + lane]) * a.num_heads + head : -1;
    const float lse = mine < 0 ? -INFINITY : a.partial_lse[mine];
    const float m = fmaxf(maximum, warp_max(lse));
    const float factor = lse == -INFINITY ? 0.0f : exp2f(lse - m), old = maximum == -INFINITY ? 0.0f : exp2f(maximum - m);
    maximum = m;
    total = total * old + warp_sum(factor);
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] *= old;
    const int count = min(kWarp, end - first);
#pragma unroll 4
    for (int slot = 0; slot < count; ++slot) {
      const float f = __shfl_sync(kAllLanes, factor, slot);
      const float* from = a.partial_out + __shfl_sync(kAllLanes, mine, slot) * kDim + lane * kEach;
      const auto partial = *reinterpret_cast<const Floats<kEach>*>(from);
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] += f == 0.0f ? 0.0f : f * partial.values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) x[i] = total == 0.0f ? 0.0f : x[i] / total;
  store_row(static_cast<T*>(a.out) + (row * a.num_heads + head) * kDim + lane * kEach, x);
}

}  // namespace

void decode_attention(const DecodeAttention& a, int head_dim, int warps, Dtype dtype, cudaStream_t stream) {
  dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    head_dim == 128 ? launch_decode<T, 128>(a, warps, stream) : launch_decode<T, 64>(a, warps, stream);
  });
}

void combine_attention(const CombineAttention& a, int head_dim, Dtype dtype, cudaStream_t stream) {
  dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid((a.num_heads + kCombineWarps - 1) / kCombineWarps, a.num_rows), block(kCombineWarps * kWarp);
    auto* kernel = head_dim == 128 ? combine_attention_kernel<T, 128> : combine_attention_kernel<T, 64>;
    launch("combine_attention", kernel, grid, block, 0, stream, a);
  });
}

}  // namespace batchinfer
