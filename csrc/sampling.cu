// Greedy and random choice of tokens. Greedy reads every logit once, bound by memory. Drawing reads a row twice, the second time
// partly from the L2 cache, and is bound by the integer arithmetic of Philox there.
//
// A token's noise is computed only if the token can still win. Of every 16 bytes of logits, the best score and the highest noise
// there is must reach the best sum that the block has seen; after Philox, so must the best score and a bound of the highest
// word's noise that takes one logarithm. Both are bounds from above with a margin for rounding, so no draw changes.
#include "sampling.h"

#include <cfloat>

#include "sampling_filter.cuh"
#include "sampling_launch.h"
#include "sampling_noise.cuh"

namespace batchinfer {
namespace {

constexpr float kMargin = 1e-4f;    // far above the rounding of a bound, which is below 2e-5
constexpr float kAboveZero = 8.0f;  // added to sums of score and noise, so that as floats they are ordered like integers

// How a row is drawn.
struct Row {
  Scores scores;
  uint32_t position;
  uint2 seed;
  Border border;

  __device__ __forceinline__ float about(float logit) const { return (logit - scores.max) * scores.inverse; }
  __device__ __forceinline__ float farthest() const {
    return border.magnitude < 0x7f800000u ? -__uint_as_float(border.magnitude) : -INFINITY;
  }
};

struct Block {
  Exchange exchange;
  Row row;
  int bar;  // float bits of kAboveZero + a sum of score and noise that a token of this block reaches
};

// The random words of a vector's tokens.
template <typename T>
struct Words {
  static constexpr int kGroups = Packed<T>::kSize / 4;
  uint4 groups[kGroups];

  __device__ __forceinline__ Words(const Row& row, int first) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) groups[i] = random_words(first / 4 + i, row.position, row.seed);
  }
  __device__ __forceinline__ uint32_t operator[](int i) const {
    const uint4& group = groups[i / 4];
    return i % 4 < 2 ? i % 4 < 1 ? group.x : group.y : i % 4 < 3 ? group.z : group.w;
  }
  __device__ __forceinline__ uint32_t highest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) most = max(most, max(max(groups[i].x, groups[i].y), max(groups[i].z, groups[i].w)));
    return most;
  }
};

__device__ __forceinline__ float bar_of(const int& bar) {
  return __int_as_float(*static_cast<const volatile int*>(&bar)) - kAboveZero - kMargin;
}

// A first bar, from the first 16 bytes of each thread: without it, every thread would take its first tokens for promising.
template <typename T>
__device__ __noinline__ void raise_bar(const Slice<T> slice, Block& block) {
  const Row row = block.row;
  const float inside = row.farthest() * (1.0f - 1e-5f) + kMargin;  // scores above it are admitted
  const int first = slice.first_of_thread();
  float best = kLeastNoise;
  if (first < slice.end) {
    const Packed<T> v = slice.load(first);
    const Words<T> words(row, first);
#pragma unroll
    for (int i = 0; i < Slice<T>::kSize; ++i) {
      const float score = row.about(v[i]);
      if (score > inside) best = fmaxf(best, score + least_noise(words[i]) - kMargin);
    }
  }
  best = warp_max(best);
  if (threadIdx.x % kWarp == 0) atomicMax(&block.bar, __float_as_int(best + kAboveZero));
  __syncthreads();
}

// The better of `best` and the tokens of v, by exact sums. Rare, hence kept out of the loop that calls it.
template <typename T>
__device__ __noinline__ Wide better_of(const Packed<T> v, int first, Block& block, Wide best) {
  const Row row = block.row;
  const Words<T> words(row, first);
  const float bar = bar_of(block.bar);
  unsigned promising = 0;
#pragma unroll
  for (int i = 0; i < Slice<T>::kSize; ++i) promising |= row.about(v[i]) + most_noise(words[i]) < bar ? 0 : 1 << i;
  for (; promising; promising &= promising - 1) {
    const int at = __ffs(promising) - 1;
    float logit = v[0];
    uint32_t word = words[0];
#pragma unroll
    for (int i = 1; i < Slice<T>::kSize; ++i)
      if (i == at) logit = v[i], word = words[i];
    const float score = row.scores(logit), sum = score + gumbel_noise(word);
    if (!(sum > -INFINITY) || !row.border.admits(magnitude_of(score), first + at)) continue;
    atomicMax(&block.bar, __float_as_int(fmaxf(sum + kAboveZero, 0.0f)));
    const Wide key = pack(sum, first + at);
    best = key > best ? key : best;
  }
  return best;
}

// The highest sum of score and noise of a thread's tokens, with its token. From the end of the slice to its beginning: what was
// read last, for the maximum, is still in the L2 cache. The bar is read ahead, as logits are; an older one is lower.
template <typename T>
__device__ __forceinline__ Wide draw_of_thread(const Slice<T>& slice, Block& block) {
  const Row row = block.row;
  const float floor = row.farthest() * (1.0f + 1e-5f) - kMargin;
  uint32_t bar_address = uint32_t(__cvta_generic_to_shared(&block.bar));
  asm volatile("mov.u32 %0, %0;" : "+r"(bar_address));  // or it is computed anew every time
  const auto read_bar = [bar_address] {
    float bits;
    asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(bits) : "r"(bar_address));
    return bits;
  };
  Wide best = 0;
  int first = slice.last_of_thread();
  Packed<T> next = {};
  if (first >= slice.begin) next = slice.load(first);
  float next_bar = read_bar();
  while (first >= slice.begin) {
    const Packed<T> v = next;
    const float bar = next_bar - kAboveZero - kMargin, score = row.about(v.highest());
    const int at = first;
    first -= Slice<T>::kStep;
    if (first >= slice.begin) next = slice.load(first);
    next_bar = read_bar();
    if (score < fmaxf(bar - kMostNoise, floor)) continue;
    if (score + most_noise(Words<T>(row, at).highest()) < bar) continue;
    best = better_of(v, at, block, best);
  }
  return best;
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2)
    greedy_kernel(int32_t* token_ids, bool* broken, const T* logits, int64_t stride, int size, int splits) {
  __shared__ Block block;
  const int row = blockIdx.x / splits, split = blockIdx.x % splits;
  Cluster cluster(block.exchange, split, splits);
  const Slice<T> slice = slice_of(logits, stride, size, row, split, splits);
  wait_for_previous();
  let_next_start();
  const Wide mine = highest_of_thread<8>(slice);
  cluster.wait_for_all();
  const Wide key = cluster.max(mine);
  if (split == 0 && threadIdx.x == 0) {
    token_ids[row] = packed_token(key);
    broken[row] = key >> 32 == 0xffffffffu;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2)
    sample_kernel(int64_t* token_ids, bool* broken, const T* logits, int64_t stride, int size, Drawing drawing, int splits) {
  __shared__ Block block;
  __shared__ Columns columns;
  const int index = blockIdx.x / splits, split = blockIdx.x % splits;
  const bool writes = split == 0 && threadIdx.x == 0;
  Cluster cluster(block.exchange, split, splits);
  if (threadIdx.x == 0) block.bar = __float_as_int(kLeastNoise + kAboveZero);  // what the highest logit has at least
  const Slice<T> slice = slice_of(logits, stride, size, index, split, splits);
  wait_for_previous();
  let_next_start();
  const Wide mine = highest_of_thread<4>(slice);
  cluster.wait_for_all();
  const Wide highest = cluster.max(mine);
  const bool is_broken = highest >> 32 == 0xffffffffu;
  if (writes) broken[index] = is_broken;
  const double temperature = drawing.temperature[index];
  const float max = packed_number(highest);
  if (!(temperature > 0) || is_broken || isinf(max)) {  // in a row with NaN all scores are NaN: the first token's wins
    if (writes) token_ids[index] = is_broken && temperature > 0 ? 0 : packed_token(highest);
    return;
  }
  const float heat = fminf(fmaxf(float(temperature), FLT_MIN), FLT_MAX);
  const Scores scores = {max, heat, 1.0f / heat};
  const int top_k = drawing.top_k[index];
  const double top_p = drawing.top_p[index], min_p = drawing.min_p[index];
  Border border = {kAnyMagnitude, kAnyToken};
  if ((top_k > 0 && top_k < size) || top_p < 1 || min_p > 0)
    border = border_of(slice, scores, cluster, columns, {top_k, top_p < 1, float(top_p), float(min_p)}, packed_token(highest));
  if (threadIdx.x == 0) {
    const int64_t seed = drawing.seeds[index];
    block.row = {scores, uint32_t(drawing.positions[index]), {uint32_t(seed), uint32_t(seed >> 32)}, border};
  }
  __syncthreads();
  raise_bar(slice, block);
  const Wide drawn = cluster.max(draw_of_thread(slice, block));
  if (writes) token_ids[index] = packed_token(drawn);
}

}  // namespace

void greedy(int32_t* token_ids, bool* broken, const Logits& logits, int splits, cudaStream_t stream) {
  splits = choose_splits(logits, splits, 16384);
  dispatch(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows("greedy", greedy_kernel<T>, logits.rows, splits, stream, token_ids, broken, static_cast<const T*>(logits.data),
                logits.stride, logits.size, splits);
  });
}

void sample(int64_t* token_ids, bool* broken, const Logits& logits, const Drawing& drawing, int splits, cudaStream_t stream) {
  splits = choose_splits(logits, splits, 4000);
  dispatch(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows("sample", sample_kernel<T>, logits.rows, splits, stream, token_ids, broken, static_cast<const T*>(logits.data),
                logits.stride, logits.size, drawing, splits);
  });
}

}  // namespace batchinfer
