// Greedy and random choice of tokens. Bound by memory: greedy reads every logit once. Drawing reads a row twice, the second time
// mostly from the L2 cache, and there the integer arithmetic of Philox takes about as long as memory does.
//
// A token's noise is looked at only if the token can still win: the score of a group of four and the highest noise there is must
// reach the best sum that the block has seen, and again after Philox with a bound that takes one logarithm. Both are bounds from
// above with a margin for rounding, so no draw changes.
#include "sampling.h"

#include <cfloat>
#include <cstdlib>

#include "sampling_filter.cuh"
#include "sampling_launch.h"
#include "sampling_noise.cuh"

namespace batchinfer {
namespace {

constexpr float kMargin = 1e-4f;     // far above the rounding of a bound, which is below 2e-5
constexpr float kAboveZero = 8.0f;   // added to sums of score and noise, so that as floats they are ordered like integers

struct Block {
  Exchange exchange;
  int bar;  // float bits of kAboveZero + the best sum of score and noise that a token of this block has
};

struct Row {
  Scores scores;
  uint32_t position;
  uint64_t seed;
  Border border;

  __device__ __forceinline__ float about(float logit) const { return (logit - scores.max) * scores.inverse; }
  __device__ __forceinline__ float farthest() const {
    return border.magnitude < 0x7f800000u ? -__uint_as_float(border.magnitude) : -INFINITY;
  }
};

// A first bar, from the first 16 bytes of each thread: without it, every thread would take its first tokens for promising.
template <typename T>
__device__ __forceinline__ void raise_bar(const Slice<T>& slice, const Row& row, int* shared_bar) {
  const float inside = row.farthest() * (1.0f - 1e-5f) + kMargin;  // scores above it are admitted
  const int first = slice.first_of_thread();
  float best = kLeastNoise;
  if (first < slice.end) {
    const Packed<T> v = slice.load(first);
#pragma unroll
    for (int group = 0; group < Slice<T>::kSize / 4; ++group) {
      const uint4 words = random_words(first / 4 + group, row.position, row.seed);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = row.about(v[group * 4 + i]);
        if (score > inside) best = fmaxf(best, score + least_noise(word[i]) - kMargin);
      }
    }
  }
  best = warp_max(best);
  if (threadIdx.x % kWarp == 0) atomicMax(shared_bar, __float_as_int(best + kAboveZero));
  __syncthreads();
}

// The highest sum of score and noise of a thread's tokens, with its token.
template <typename T>
__device__ __forceinline__ Wide draw_of_thread(const Slice<T>& slice, const Row& row, int* shared_bar) {
  const float floor = row.farthest() * (1.0f + 1e-5f) - kMargin;
  float best = -INFINITY;
  int best_token = 0;
  Packed<T> next = slice.load(slice.first_of_thread());
  for (int first = slice.first_of_thread(); first < slice.end; first += Slice<T>::kStep) {
    const Packed<T> v = next;
    next = slice.load(first + Slice<T>::kStep);
    const float bar = __int_as_float(*static_cast<volatile int*>(shared_bar)) - kAboveZero - kMargin;
#pragma unroll
    for (int group = 0; group < Slice<T>::kSize / 4; ++group) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = v[group * 4 + i];
      const float score = row.about(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
      if (score < fmaxf(bar - kMostNoise, floor)) continue;
      const uint4 words = random_words(first / 4 + group, row.position, row.seed);
      if (score + most_noise(max(max(words.x, words.y), max(words.z, words.w))) < bar) continue;
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
      unsigned promising = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) promising |= row.about(x[i]) + most_noise(word[i]) < bar ? 0 : 1 << i;
      for (; promising; promising &= promising - 1) {
        const int i = __ffs(promising) - 1, token = first + group * 4 + i;
        const float exact = row.scores(i < 2 ? i < 1 ? x[0] : x[1] : i < 3 ? x[2] : x[3]);
        const float sum = exact + gumbel_noise(i < 2 ? i < 1 ? word[0] : word[1] : i < 3 ? word[2] : word[3]);
        if (!(sum > best) || !row.border.admits(magnitude_of(exact), token)) continue;
        best = sum, best_token = token;
        atomicMax(shared_bar, __float_as_int(fmaxf(best + kAboveZero, 0.0f)));
      }
    }
  }
  return best > -INFINITY ? pack(best, best_token) : 0;
}

template <typename T, int kInFlight, int kBlocks>
__global__ void __launch_bounds__(kSampleThreads, kBlocks)
    greedy_kernel(int32_t* token_ids, bool* broken, const T* logits, int64_t stride, int size, int splits) {
  __shared__ Block block;
  const int row = blockIdx.x / splits, split = blockIdx.x % splits;
  Cluster cluster(block.exchange, split, splits);
  const Slice<T> slice = slice_of(logits, stride, size, row, split, splits);
  wait_for_previous();
  let_next_start();
  const Wide mine = highest_of_thread<kInFlight>(slice);
  cluster.wait_for_all();
  const Wide key = cluster.max(mine);
  if (split == 0 && threadIdx.x == 0) {
    token_ids[row] = packed_token(key);
    broken[row] = key >> 32 == 0xffffffffu;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2) sample_kernel(int64_t* token_ids, bool* broken, const T* logits, int64_t stride,
                                                                   int size, Drawing drawing, int splits, int room) {
  extern __shared__ uint32_t columns[];
  __shared__ Block block;
  const int index = blockIdx.x / splits, split = blockIdx.x % splits;
  const bool writes = split == 0 && threadIdx.x == 0;
  Cluster cluster(block.exchange, split, splits);
  if (threadIdx.x == 0) block.bar = __float_as_int(kLeastNoise + kAboveZero);  // what the highest logit has at least
  const Slice<T> slice = slice_of(logits, stride, size, index, split, splits);
  wait_for_previous();
  let_next_start();
  const Wide mine = highest_of_thread(slice);
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
  Row row = {{max, heat, 1.0f / heat}, uint32_t(drawing.positions[index]), uint64_t(drawing.seeds[index]), {kAnyMagnitude, kAnyToken}};
  const int top_k = drawing.top_k[index];
  const double top_p = drawing.top_p[index], min_p = drawing.min_p[index];
  if ((top_k > 0 && top_k < size) || top_p < 1 || min_p > 0)
    row.border = Search<T>(slice, row.scores, cluster, columns, room)
                     .border(top_k, top_p < 1, float(top_p), float(min_p), size, packed_token(highest));
  raise_bar(slice, row, &block.bar);
  const Wide drawn = cluster.max(draw_of_thread(slice, row, &block.bar));
  if (writes) token_ids[index] = packed_token(drawn);
}

}  // namespace

void greedy(int32_t* token_ids, bool* broken, const Logits& logits, int splits, cudaStream_t stream) {
  const RowLaunch plan = plan_rows(logits, splits, false);
  dispatch(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto go = [&](auto kernel) {
    launch_rows("greedy", kernel, logits.rows, plan, stream, token_ids, broken, static_cast<const T*>(logits.data),
                logits.stride, logits.size, plan.splits); };
    const char* e = getenv("GV");
    switch (e ? atoi(e) : 0) {
      case 0: return go(greedy_kernel<T, 4, 3>);
      case 1: return go(greedy_kernel<T, 2, 4>);
      case 2: return go(greedy_kernel<T, 8, 2>);
      case 3: return go(greedy_kernel<T, 3, 3>);
      case 4: return go(greedy_kernel<T, 6, 2>);
    }
  });
}

void sample(int64_t* token_ids, bool* broken, const Logits& logits, const Drawing& drawing, int splits, cudaStream_t stream) {
  const RowLaunch plan = plan_rows(logits, splits, true);
  dispatch(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows("sample", sample_kernel<T>, logits.rows, plan, stream, token_ids, broken, static_cast<const T*>(logits.data),
                logits.stride, logits.size, drawing, plan.splits, plan.room);
  });
}

}  // namespace batchinfer
