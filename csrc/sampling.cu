// Greedy and random choice of tokens. Bound by memory: greedy reads every logit once. Drawing reads a row twice, the second time
// mostly from the L2 cache, and there the integer arithmetic of Philox takes about as long as memory does.
//
// A token's noise is looked at only if the token can still win: the score of a group of four and the highest noise there is must
// reach the best sum that the block has seen, and again after Philox with a bound that takes one logarithm. Both are bounds from
// above with a margin for rounding, so no draw changes.
#include "sampling.h"

#include "common/launch.h"
#include "sampling_filter.cuh"
#include "sampling_noise.cuh"

namespace batchinfer {
namespace {

constexpr int kInFlight = 4;         // loads of 16 bytes that a thread has under way
constexpr float kMargin = 1e-4f;     // far above the rounding of a bound, which is below 2e-5
constexpr float kAboveZero = 8.0f;   // added to sums of score and noise, so that as floats they are ordered like integers

struct Block {
  Exchange exchange;
  int bar;  // float bits of kAboveZero + the best sum of score and noise that a token of this block has
};

// The highest of a thread's logits with its token.
template <typename T>
__device__ __forceinline__ Wide highest_of_thread(const Slice<T>& slice) {
  float best = -INFINITY;
  Packed<T> held;
  int held_first = -1;
  for (int first = slice.first_of_thread(); first < slice.end; first += kInFlight * Slice<T>::kStep) {
    Packed<T> v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) v[i] = slice.load(first + i * Slice<T>::kStep);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const float m = v[i].highest();
      if (!(m <= best) && best == best) best = m, held = v[i], held_first = first + i * Slice<T>::kStep;
    }
  }
  if (held_first < 0) return slice.first_of_thread() < slice.end ? pack(-INFINITY, slice.first_of_thread()) : 0;
  int at = 0;
#pragma unroll
  for (int i = Slice<T>::kSize - 1; i >= 0; --i) {
    const float x = held[i];
    if (x == best || x != x) at = i;
  }
  return pack(best, held_first + at);
}

struct Row {
  float max, heat, inverse;
  uint32_t position;
  uint64_t seed;
  Border border;
};

// The highest sum of score and noise of a thread's tokens, with its token.
template <typename T>
__device__ __forceinline__ Wide draw_of_thread(const Slice<T>& slice, const Row& row, int* shared_bar) {
  const float farthest = row.border.magnitude < 0x7f800000u ? -__uint_as_float(row.border.magnitude) : -INFINITY;
  const float floor = farthest * (1.0f + 1e-5f) - kMargin;
  float best = -INFINITY;
  int best_token = 0;
  Packed<T> next = slice.load(slice.first_of_thread());
  for (int first = slice.first_of_thread(); first < slice.end; first += Slice<T>::kStep) {
    const Packed<T> v = next;
    next = slice.load(first + Slice<T>::kStep);
    float bar = __int_as_float(*static_cast<volatile int*>(shared_bar)) - kAboveZero - kMargin;
#pragma unroll
    for (int group = 0; group < Slice<T>::kSize / 4; ++group) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = v[group * 4 + i];
      const float score = (fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) - row.max) * row.inverse;
      if (score < fmaxf(bar - kMostNoise, floor)) continue;
      const uint4 words = random_words(first / 4 + group, row.position, row.seed);
      if (score + most_noise(max(max(words.x, words.y), max(words.z, words.w))) < bar) continue;
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
      bool better = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float exact = __fdiv_rn(x[i] - row.max, row.heat), sum = exact + gumbel_noise(word[i]);
        if (!(sum > best) || !row.border.admits(magnitude_of(exact), first + group * 4 + i)) continue;
        best = sum, best_token = first + group * 4 + i, better = true;
      }
      if (better) atomicMax(shared_bar, __float_as_int(fmaxf(best + kAboveZero, 0.0f)));
    }
  }
  return best > -INFINITY ? pack(best, best_token) : 0;
}

template <typename T>
__device__ __forceinline__ Slice<T> slice_of(const T* logits, int64_t stride, int size, int row, int split, int splits) {
  constexpr int kSize = Packed<T>::kSize;
  const int share = (size + splits * kSize - 1) / (splits * kSize) * kSize;
  const T* begin = logits + row * stride;
  return {begin, min(split * share, size), min((split + 1) * share, size), size, reinterpret_cast<uintptr_t>(begin) % 16 == 0};
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 3)
    greedy_kernel(int32_t* token_ids, bool* broken, const T* logits, int64_t stride, int size, int splits) {
  __shared__ Block block;
  const int row = blockIdx.x / splits, split = blockIdx.x % splits;
  Cluster cluster(block.exchange, split, splits);
  const Slice<T> slice = slice_of(logits, stride, size, row, split, splits);
  wait_for_previous();
  let_next_start();
  const Wide mine = highest_of_thread(slice);
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
  const float heat = fmaxf(float(temperature), 1.17549435e-38f);
  Row row = {max, heat, 1.0f / heat, uint32_t(drawing.positions[index]), uint64_t(drawing.seeds[index]), {kAnyMagnitude, kAnyToken}};
  const int top_k = drawing.top_k[index];
  const double top_p = drawing.top_p[index], min_p = drawing.min_p[index];
  if ((top_k > 0 && top_k < size) || top_p < 1 || min_p > 0)
    row.border = Search<T>(slice, max, heat, cluster, columns, room)
                     .border(top_k, top_p < 1, float(top_p), float(min_p), size, packed_token(highest));
  const Wide drawn = cluster.max(draw_of_thread(slice, row, &block.bar));
  if (writes) token_ids[index] = packed_token(drawn);
}

// A power of two of blocks for each row: two for each multiprocessor in all, unless a block would have next to nothing to do.
int choose_splits(const Logits& logits, int least) {
  if (!is_hopper_or_later()) return 1;
  int splits = 1;
  while (splits < kMaxSplits && (splits < least || logits.rows * splits < 2 * num_multiprocessors()) &&
         logits.size > splits * kSampleThreads * 8)
    splits *= 2;
  return splits;
}

// `launch` for clusters of `splits` blocks, one cluster for each row.
template <typename... Parameters, typename... Arguments>
void launch_rows(const char* name, void (*kernel)(Parameters...), int64_t rows, int splits, size_t smem, cudaStream_t stream,
                 Arguments&&... arguments) {
  if (rows == 0) return;
  if (smem > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)), name);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(rows * splits);
  config.blockDim = dim3(kSampleThreads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper_or_later() ? 0 : splits == 1 ? 1 : 2;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

// Words of shared memory for the tokens that filters search, if two blocks of a multiprocessor have room for all of them.
int words_of_row(int size, int splits, int vector) {
  const int share = (size + splits * vector - 1) / (splits * vector) * vector;
  return (share + kSampleThreads * vector - 1) / (kSampleThreads * vector) * kSampleThreads * vector;
}

int most_words() { return (device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 4 * 1024) / 4; }

}  // namespace

void greedy(int32_t* token_ids, bool* broken, const Logits& logits, int splits, cudaStream_t stream) {
  splits = splits > 0 && is_hopper_or_later() ? splits : choose_splits(logits, 1);
  dispatch(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows("greedy", greedy_kernel<T>, logits.rows, splits, 0, stream, token_ids, broken, static_cast<const T*>(logits.data),
                logits.stride, logits.size, splits);
  });
}

void sample(int64_t* token_ids, bool* broken, const Logits& logits, const Drawing& drawing, int splits, cudaStream_t stream) {
  dispatch(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Packed<T>::kSize;
    int least = 1;
    while (least < kMaxSplits && words_of_row(logits.size, least, kSize) > most_words()) least *= 2;
    const int blocks = splits > 0 && is_hopper_or_later() ? splits : choose_splits(logits, least);
    const int words = words_of_row(logits.size, blocks, kSize), room = words <= most_words() ? words : 0;
    launch_rows("sample", sample_kernel<T>, logits.rows, blocks, size_t(room) * 4, stream, token_ids, broken,
                static_cast<const T*>(logits.data), logits.stride, logits.size, drawing, blocks, room);
  });
}

}  // namespace batchinfer
