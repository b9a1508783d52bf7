// Where top-k, top-p and min-p cut a row, without sorting it.
//
// Scores are (logit - highest) / temperature, 0 or less, so the bits of their magnitude order them as integers, 0 the best. What
// the filters leave is all tokens up to a border in the order (magnitude, token). It is found digit by digit: a pass sums the
// tokens' weights (1 for top-k, their probability for top-p) over eight bins of what is still in question, and the bin in which
// the sum reaches its target is looked into next. Weights are integers, so that sums depend on no order and a bin's parts add up
// to it exactly. A thread keeps its tokens that are still in question in shared memory once they fit, and reads its share of the
// row again until then.
#pragma once

#include "sampling_row.cuh"

namespace batchinfer {

constexpr uint32_t kAnyMagnitude = 0x7fffffffu;
constexpr int kAnyToken = 0x7fffffff;
constexpr int kRoom = 16;  // tokens that a thread keeps

struct Columns {
  uint32_t keys[kRoom][kSampleThreads];
};

struct Border {
  uint32_t magnitude;
  int token;
  __device__ __forceinline__ bool admits(uint32_t m, int t) const { return m < magnitude || (m == magnitude && t <= token); }
};

__device__ __forceinline__ uint32_t magnitude_of(float score) { return __float_as_uint(score) & kAnyMagnitude; }

// The first pass over magnitudes looks at octaves: up to 1/4, six of them, from 16 on.
__device__ __forceinline__ int octave_of(uint32_t magnitude) { return min(max(int(magnitude >> 23) - 124, 0), kBins - 1); }
__device__ __forceinline__ uint32_t first_of_octave(int octave) { return octave == 0 ? 0 : uint32_t(octave + 124) << 23; }

// What a token weighs in a search: one, or its probability.
struct One {
  __device__ __forceinline__ uint32_t operator()(uint32_t, int) const { return 1; }
  __device__ __forceinline__ int shift(int) const { return 0; }
};

// exp(-magnitude) in units of 2^-44 << shift(octave). The units are coarser in octaves where it is large, so that the sum over a
// thread's tokens of an octave (1023 at most) has room in 32 bits; the highest of an octave has some 22.
struct Mass {
  static constexpr int kBits = 44;
  __device__ __forceinline__ uint32_t operator()(uint32_t magnitude, int octave) const {
    const float scale = __int_as_float((127 + kBits - shift(octave)) << 23);
    float mass;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(mass) : "f"(__uint_as_float(magnitude) * -1.44269504f));
    return __float2uint_rn(mass * scale);
  }
  __device__ __forceinline__ int shift(int octave) const { return int(0x010b111415161616ull >> (8 * octave)) & 0xff; }
};

// What a row asks for.
struct Limits {
  int top_k;
  bool cuts_mass;  // by top_p
  float top_p, min_p;
};

// What a search is left with: the first key at which the sum reaches the target, the sum before it and at it, and of one token.
struct Found {
  uint32_t key;
  Wide before, at, target, weight;
};

// sum += x if a == b, in a predicated instruction: the compiler would select between x and 0 first.
__device__ __forceinline__ void add_if_equal(int a, int b, uint32_t& sum, uint32_t x) {
  asm("{\n.reg .pred p;\nsetp.eq.s32 p, %2, %3;\n@p add.u32 %0, %0, %1;\n}" : "+r"(sum) : "r"(x), "r"(a), "r"(b));
}

// What a pass finds out: sums of weights in bins, and the range of the keys.
struct Pass {
  uint32_t sums[kBins] = {}, highest = 0, lowest = 0xffffffffu;

  __device__ __forceinline__ void add(uint32_t key, int bin, uint32_t weight) {
#pragma unroll
    for (int i = 0; i < kBins; ++i) add_if_equal(bin, i, sums[i], weight);
    highest = max(highest, key), lowest = min(lowest, key);
  }

  // Makes the range that of the cluster's threads. Returns the sum of bin i in lane i; shift(bin): what the bin's sum is to be
  // shifted by.
  template <typename Shift>
  __device__ __forceinline__ Wide tell(Cluster& cluster, Shift shift) {
    Wide bins[kBins];
#pragma unroll
    for (int i = 0; i < kBins; ++i) bins[i] = Wide(sums[i]) << shift(i);
    const Wide told = cluster.sum(bins, highest, ~lowest);
    highest = uint32_t(__shfl_sync(kAllLanes, told, kBins)), lowest = ~uint32_t(__shfl_sync(kAllLanes, told, kBins + 1));
    return told;
  }
};

template <typename T>
class Search {
 public:
  __device__ Search(const Slice<T>& slice, const Scores& scores, Cluster& cluster, Columns& columns)
      : slice_(slice), scores_(scores), cluster_(cluster), column_(columns.keys[0] + threadIdx.x) {}

  // likeliest: the token with score 0, which stays in any case.
  __device__ Border border(const Limits& limits, int likeliest) {
    Border border = {kAnyMagnitude, kAnyToken};
    if (limits.top_k > 0 && limits.top_k < slice_.size) border.magnitude = kth_magnitude(limits.top_k);
    if (limits.cuts_mass) border = border_of_mass(border.magnitude, limits.top_p);
    if (limits.min_p > 0) border = nearer(border, {least_likely(limits.min_p), kAnyToken});
    return border.admits(0, likeliest) ? border : Border{0, likeliest};
  }

  // The border of the k likeliest tokens, exactly: of equals at the border the lower ids are in. In the order of ~ordered(logit).
  __device__ Border likeliest(int k) {
    const auto all = [](float logit, int, uint32_t& key) { return key = ~ordered(logit), true; };
    const Found found = find<false>(all, One(), 0xffffffffu, [k](Wide) { return Wide(k); });
    return {found.key, last_of_equals([found](float logit) { return ~ordered(logit) == found.key; }, found)};
  }

 private:
  __device__ static Border nearer(Border a, Border b) { return b.admits(a.magnitude, a.token) ? a : b; }

  __device__ uint32_t magnitude(float logit) const { return magnitude_of(scores_(logit)); }

  __device__ uint32_t kth_magnitude(int k) {
    const auto all = [this](float logit, int, uint32_t& key) { return key = magnitude(logit), true; };
    return find<true>(all, One(), kAnyMagnitude, [k](Wide) { return Wide(k); }).key;
  }

  // The last token before which less than top_p of the mass of the magnitudes up to `limit` lies.
  __device__ Border border_of_mass(uint32_t limit, float top_p) {
    const auto left = [this, limit](float logit, int, uint32_t& key) { return key = magnitude(logit), key <= limit; };
    const auto target = [top_p](Wide total) { return Wide(fmax(1.0, ceil(double(top_p) * double(total)))); };
    const Found found = find<true>(left, Mass(), kAnyMagnitude, target);
    const auto equal = [this, found](float logit) { return magnitude(logit) == found.key; };
    return {found.key, last_of_equals(equal, found)};
  }

  // The last token that stays of those equal at the key found.
  template <typename Equal>
  __device__ int last_of_equals(Equal equal, const Found& found) {
    const Wide weight = found.weight > 0 ? found.weight : 1, needed = (found.target - found.before + weight - 1) / weight;
    if (needed >= found.at / weight) return kAnyToken;
    const auto select = [equal](float logit, int token, uint32_t& key) { return key = token, equal(logit); };
    return int(find<false>(select, One(), slice_.size - 1, [needed](Wide) { return needed; }).key);
  }

  // The largest magnitude whose probability is min_p of the highest, or more, as float32 has it. 0 if there is none.
  __device__ static uint32_t least_likely(float min_p) {
    uint32_t good = 0, bad = 0x7f800001u;
    while (bad - good > 1) {
      const uint32_t middle = good + (bad - good) / 2;
      (expf(-__uint_as_float(middle)) >= min_p ? good : bad) = middle;
    }
    return good;
  }

  // The first key, at most `high`, at which the sum of weights reaches target_of(sum of all weights). select(logit, token, key)
  // says whether a token takes part, and with which key.
  template <bool kMagnitudes, typename Select, typename Weigh, typename Target>
  __device__ Found find(Select select, Weigh weigh, uint32_t high, Target target_of) {
    uint32_t low = 0;
    int octave = 0, kept = kRoom + 1;
    Found found = {};
    if constexpr (kMagnitudes) {
      Pass pass;
      each_of_row(select, [&](uint32_t key) { pass.add(key, octave_of(key), weigh(key, octave_of(key))); });
      const Wide told = pass.tell(cluster_, [&](int bin) { return weigh.shift(bin); });
      found.target = target_of(total(told));
      octave = choose(told, found);
      low = max(first_of_octave(octave), pass.lowest);
      high = min(octave == kBins - 1 ? high : first_of_octave(octave + 1) - 1, pass.highest);
    }
    for (bool first = !kMagnitudes; first || low < high; first = false) {  // until a single key is left
      const int shift = max(0, 29 - __clz(high - low));                    // eight bins
      Pass pass;
      kept = each_kept(select, kept, [&](uint32_t key) {
        if (key < low || key > high) return false;
        pass.add(key, int((key - low) >> shift), weigh(key, octave));
        return true;
      });
      const Wide told = pass.tell(cluster_, [&](int) { return weigh.shift(octave); });
      if (first) found.target = target_of(total(told));
      low += uint32_t(choose(told, found)) << shift, high = min(high, low + ((1u << shift) - 1));
      low = max(low, pass.lowest), high = min(high, pass.highest);
    }
    found.key = low;
    found.weight = Wide(weigh(low, octave)) << weigh.shift(octave);
    return found;
  }

  // Of the bins, of which lane i holds sum i.
  __device__ static Wide total(Wide sum) {
    Wide all = sum;
#pragma unroll
    for (int offset = 1; offset < kBins; offset *= 2) all += __shfl_xor_sync(kAllLanes, all, offset);
    return __shfl_sync(kAllLanes, all, 0);
  }

  // The bin, of which lane i holds sum i, in which the target is reached.
  __device__ static int choose(Wide sum, Found& found) {
    Wide upto = sum;
#pragma unroll
    for (int offset = 1; offset < kBins; offset *= 2) {
      const Wide lower = __shfl_up_sync(kAllLanes, upto, offset, kBins);
      if (int(threadIdx.x % kBins) >= offset) upto += lower;
    }
    const unsigned reached = __ballot_sync(kAllLanes, found.before + upto >= found.target) & 0xffu;
    const int bin = reached ? __ffs(reached) - 1 : kBins - 1;
    found.at = __shfl_sync(kAllLanes, sum, bin);
    found.before += __shfl_sync(kAllLanes, upto - sum, bin);
    return bin;
  }

  // body(key) for the selected tokens of this thread. Beyond the row's end there is -inf: without a probability, and behind all
  // others where it counts, so nothing changes.
  template <typename Select, typename Body>
  __device__ __forceinline__ void each_of_row(Select select, Body body) const {
    for (int token = slice_.first_of_thread(); token < slice_.end; token += Slice<T>::kStep) {
      const Packed<T> v = slice_.load(token);
#pragma unroll
      for (int i = 0; i < Slice<T>::kSize; ++i) {
        uint32_t key;
        if (select(v[i], token + i, key)) body(key);
      }
    }
  }

  // The same for those that the thread kept of them, or for all where they were too many. body(key) says whether the token is
  // still in question. Returns how many are.
  template <typename Select, typename Body>
  __device__ __forceinline__ int each_kept(Select select, int kept, Body body) const {
    int left = 0;
    if (kept <= kRoom) {
      for (int i = 0; i < kept; ++i) {
        const uint32_t key = column_[i * kSampleThreads];
        if (body(key)) column_[left++ * kSampleThreads] = key;
      }
      return left;
    }
    each_of_row(select, [&](uint32_t key) {
      if (!body(key)) return;
      if (left < kRoom) column_[left * kSampleThreads] = key;
      ++left;
    });
    return left;
  }

  const Slice<T> slice_;
  const Scores scores_;
  Cluster& cluster_;
  uint32_t* const column_;  // this thread's: every kSampleThreads-th word
};

// A call of its own, so that what the caller holds does not crowd the search's registers, nor the other way round.
template <typename T>
__device__ __noinline__ Border border_of(const Slice<T> slice, const Scores scores, Cluster& cluster, Columns& columns,
                                         const Limits limits, int likeliest) {
  return Search<T>(slice, scores, cluster, columns).border(limits, likeliest);
}

}  // namespace batchinfer
