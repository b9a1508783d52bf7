// Decode attention: bound by reading keys and values once. The warps of a block work on a part of the plan for one KV head; each
// takes chunks of 16 tokens in turn and computes on them by itself (decode_attention_warp.cuh), with the next chunk on its way
// into registers meanwhile. At the end of each segment they merge what they have in shared memory.
//
// The softmax is online (Milakov and Gimelshein 2018) per warp, split over the context as in Flash-Decoding (Dao et al. 2023).
#include "decode_attention.h"

#include "common/device.cuh"
#include "common/fragments.cuh"
#include "common/launch.h"
#include "decode_attention_warp.cuh"

namespace batchinfer {
namespace {

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
__global__ void __launch_bounds__(kMaxWarps<kHeads>* kWarp, 1)
    decode_attention_kernel(const __grid_constant__ DecodeAttention a) {
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
  wait_for_previous();
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
}

template <typename T, int kDim, int kHeads>
void launch_decode(DecodeAttention a, int warps, cudaStream_t stream) {
  warps = warps < kMaxWarps<kHeads> ? warps : kMaxWarps<kHeads>;
  const dim3 grid(a.num_kv_heads, a.num_parts), block(warps * kWarp);
  // Where all blocks start at once; later ones would find nothing to wait for.
  a.look_ahead = grid.x * grid.y * warps <= unsigned(kWarpsAtOnce * num_multiprocessors());
  const size_t smem = Results<kDim, kHeads>::bytes(warps);
  launch("decode_attention", decode_attention_kernel<T, kDim, kHeads>, grid, block, smem, stream, a);
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
