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
// the warps of a block merge at the end of each segment in shared memory.
#include "decode_attention.h"

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

// The first chunk of a warp, as the plan said while the previous kernel was still running: to be confirmed.
struct Guess {
  int segment = -1, sequence, begin, end, chunk, block;

  __device__ __forceinline__ const int* entry(const DecodeAttention& a) const {
    return a.block_tables + sequence * a.table_stride + block_of(a, chunk);
  }

  // What is read here may not have been written yet. So it is read past L1, which would keep it, and not trusted to lie in range.
  __device__ __forceinline__ static Guess make(const DecodeAttention& a, int warp) {
    Guess guess;
    const int index = load_racing(a.part_indptr + blockIdx.y);
    if (index < 0 || index >= a.num_segments) return guess;
    const int* segment = a.segments + int64_t(index) * kSegmentFields;
    guess.sequence = load_racing(segment + 1), guess.begin = load_racing(segment + 2), guess.end = load_racing(segment + 3);
    guess.chunk = guess.begin / kTokens + warp;
    if (guess.chunk < 0 || guess.chunk >= (guess.end + kTokens - 1) / kTokens) return guess;
    if (guess.sequence < 0 || guess.sequence >= a.num_tables || block_of(a, guess.chunk) >= a.table_width) return guess;
    guess.block = load_racing(guess.entry(a));
    if (guess.block >= 0 && guess.block < a.num_blocks) guess.segment = index;
    return guess;
  }
  __device__ __forceinline__ bool made() const { return segment >= 0; }
  __device__ __forceinline__ bool confirmed(const DecodeAttention& a, int first_segment, int last_segment) const {
    const Segment s = Segment::load(a.segments, segment);
    const bool same_block = *entry(a) == block, same_part = first_segment == segment && segment < last_segment;
    return same_block & same_part & (s.sequence == sequence) & (s.begin == begin) & (s.end == end);
  }
};

// Walks the chunks that one warp is to load, through all segments of its part, with the block id of the current one on the way.
struct Cursor {
  const DecodeAttention& a;
  int segment, last_segment, warp, warps, chunk = 0, end = 0, block = 0;
  const int* table = nullptr;

  __device__ __forceinline__ void take(const Guess& guess) {
    chunk = guess.chunk, end = (guess.end + kTokens - 1) / kTokens, block = guess.block;
    table = a.block_tables + guess.sequence * a.table_stride;
  }

  __device__ __forceinline__ void open() {
    for (; segment < last_segment; ++segment) {
      const Segment s = Segment::load(a.segments, segment);
      chunk = s.first_chunk() + warp, end = s.end_chunk();
      table = a.block_tables + s.sequence * a.table_stride;
      if (chunk < end) return fetch();
    }
  }
  __device__ __forceinline__ void advance() {
    chunk += warps;
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

template <int kSize>
struct alignas(kSize * sizeof(float)) Floats {
  float values[kSize];
};

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

// What the warps of a block have of the heads of their group, in shared memory.
template <int kDim, int kHeads>
struct Results {
  static constexpr int kOut = kHeads * kDim, kEach = kDim / kWarp;
  float* outs;         // [warps][kHeads][kDim]
  float2* statistics;  // [warps][kHeads] (maximum, sum)

  __device__ __forceinline__ Results(float4* shared, int warps)
      : outs(reinterpret_cast<float*>(shared)), statistics(reinterpret_cast<float2*>(outs + warps * kOut)) {}
  static constexpr size_t bytes(int warps) { return warps * (kOut * sizeof(float) + kHeads * sizeof(float2)); }

  __device__ __forceinline__ Merged<kEach> merge(int head, int warps) const {
    const int lane = threadIdx.x % kWarp;
    return Merged<kEach>::of(
        warps, [&](int warp) { return statistics[warp * kHeads + head]; },
        [&](int warp) { return *reinterpret_cast<const Floats<kEach>*>(outs + warp * kOut + head * kDim + lane * kEach); });
  }
};

// Grid: (KV heads, parts), so that the heads of a part, whose tokens lie beside each other, run at the same time.
template <typename T, int kDim, int kHeads>
__global__ void __launch_bounds__(kMaxWarps<kHeads>* kWarp, 1) decode_attention_kernel(const __grid_constant__ DecodeAttention a) {
  extern __shared__ float4 shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int kv_head = blockIdx.x, group = a.num_heads / a.num_kv_heads, first_head = kv_head * group;
  const T* k_cache = static_cast<const T*>(a.k_cache) + kv_head * a.k_head_stride;
  const T* v_cache = static_cast<const T*>(a.v_cache) + kv_head * a.v_head_stride;
  const auto keys = [&](int block, int chunk) { return k_cache + block * a.k_block_stride + token_in_block(a, chunk) * kDim; };
  const auto values = [&](int block, int chunk) { return v_cache + block * a.v_block_stride + token_in_block(a, chunk) * kDim; };
  const float scale = a.scale * kLog2E;
  Results<kDim, kHeads> results(shared, warps);
  Warp<T, kDim, kHeads> w(lane);

  Guess guess;
  if (a.look_ahead) guess = Guess::make(a, warp);
  if (guess.made() && lane * kLine < kTokens * kDim * int(sizeof(T))) {
    prefetch(keys(guess.block, guess.chunk) + lane * (kLine / int(sizeof(T))));
    prefetch(values(guess.block, guess.chunk) + lane * (kLine / int(sizeof(T))));
  }
  if (!a.beside_previous) wait_for_previous();
  let_next_start();
  if (guess.made()) w.load_keys(keys(guess.block, guess.chunk)), w.load_values(values(guess.block, guess.chunk));
  int segment = a.part_indptr[blockIdx.y];
  const int last_segment = a.part_indptr[blockIdx.y + 1];
  Cursor next{.a = a, .segment = segment, .last_segment = last_segment, .warp = warp, .warps = warps};
  if (guess.made() && guess.confirmed(a, segment, last_segment)) {
    next.take(guess);
    next.advance();
  } else {
    next.open();
    if (next.valid()) {
      w.load_keys(keys(next.block, next.chunk)), w.load_values(values(next.block, next.chunk));
      next.advance();
    }
  }
  for (; segment < last_segment; ++segment) {
    const Segment s = Segment::load(a.segments, segment);
    w.begin_segment(static_cast<const T*>(a.q) + s.row * a.q_stride + first_head * kDim, group);
    for (int chunk = s.first_chunk() + warp; chunk < s.end_chunk(); chunk += warps) {
      const int begin = s.begin - chunk * kTokens, end = s.end - chunk * kTokens;
      const bool partly = begin > 0 || end < kTokens, more = next.valid();
      float scores[w.kColumnTiles][4];
      w.multiply_keys(scores, scale);
      if (more) w.load_keys(keys(next.block, next.chunk));
      if (partly) w.mask_scores(scores, begin, end);
      w.soften(scores);
      if (partly) w.mask_values(begin, end);
      w.multiply_values(scores);
      if (more) {
        w.load_values(values(next.block, next.chunk));
        next.advance();
      }
    }
    __syncthreads();  // the previous segment has been merged
    w.store(results.outs + warp * results.kOut, results.statistics + warp * kHeads);
    __syncthreads();
    for (int head = warp; head < group; head += warps)
      finish<T, kDim>(a, results.merge(head, warps), s.row, s.slot, first_head + head);
  }
  if (a.beside_previous) wait_for_previous();  // so that the end of this kernel is the end of both
}

template <typename T, int kDim, int kHeads>
void launch_decode(DecodeAttention a, int warps, cudaStream_t stream) {
  warps = warps < kMaxWarps<kHeads> ? warps : kMaxWarps<kHeads>;
  const dim3 grid(a.num_kv_heads, a.num_parts), block(warps * kWarp);
  // Where all blocks start at once; later ones would find nothing to wait for.
  a.look_ahead = grid.x * grid.y * warps <= unsigned(kWarpsAtOnce * num_multiprocessors());
  launch("decode_attention", decode_attention_kernel<T, kDim, kHeads>, grid, block, Results<kDim, kHeads>::bytes(warps), stream, a);
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
