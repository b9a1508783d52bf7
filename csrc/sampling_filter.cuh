// Where top-k, top-p and min-p cut a row, without sorting it.
//
// Scores are (logit - highest) / temperature, 0 or less, so the bits of their magnitude order them as integers, 0 the best. What
// the filters leave is all tokens up to a border in the order (magnitude, token). It is found digit by digit: a pass sums the
// tokens' weights (1 for top-k, their probability for top-p) over eight bins of what is still in question, and the bin in which
// the sum reaches its target is looked into next. Weights are integers, so that sums depend on no order and a bin's parts add up
// to it exactly. Tokens that are still in question are kept in shared memory where there is room, else looked up every time.
#pragma once

#include "sampling_row.cuh"

namespace batchinfer {

constexpr uint32_t kAnyMagnitude = 0x7fffffffu;
constexpr int kAnyToken = 0x7fffffff;

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
    return __float2uint_rn(exp2f(__uint_as_float(magnitude) * -1.44269504f) * scale);
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

template <typename T>
class Search {
 public:
  __device__ Search(const Slice<T>& slice, const Scores& scores, Cluster& cluster, uint32_t* memory, int room)
      : slice_(slice), scores_(scores), cluster_(cluster), column_(memory + threadIdx.x), room_(room) {}

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
    int octave = 0;
    Found found = {};
    for (bool first = true;; first = false) {
      const bool octaves = kMagnitudes && first;
      const int shift = max(0, 29 - __clz(high - low));  // eight bins
      uint32_t sums[kBins] = {}, highest = 0, lowest = 0;  // lowest: its complement
      const auto visit = [&](uint32_t key) {
        if (key < low || key > high) return false;
        const int bin = octaves ? octave_of(key) : int((key - low) >> shift);
        const uint32_t weight = weigh(key, octaves ? bin : octave);
#pragma unroll
        for (int i = 0; i < kBins; ++i) add_if_equal(bin, i, sums[i], weight);
        highest = max(highest, key), lowest = max(lowest, ~key);
        return true;
      };
      if (room_ == 0)
        each_of_row(select, [&](uint32_t key) { visit(key); });
      else if (first)
        gather(select, visit);
      else
        compact(visit);
      Wide bins[kBins];
#pragma unroll
      for (int i = 0; i < kBins; ++i) bins[i] = Wide(sums[i]) << weigh.shift(octaves ? i : octave);
      const Wide told = cluster_.sum(bins, highest, lowest);
      highest = uint32_t(__shfl_sync(kAllLanes, told, kBins)), lowest = ~uint32_t(__shfl_sync(kAllLanes, told, kBins + 1));
      const int bin = choose(told, first, target_of, found);
      if (octaves) {
        octave = bin;
        low = first_of_octave(bin), high = bin == kBins - 1 ? kAnyMagnitude : first_of_octave(bin + 1) - 1;
      } else {
        low += uint32_t(bin) << shift, high = min(high, low + ((1u << shift) - 1));
      }
      low = max(low, lowest), high = min(high, highest);
      if (low >= high) break;  // a single key is left
    }
    found.key = low;
    found.weight = Wide(weigh(low, octave)) << weigh.shift(octave);
    return found;
  }

  // The bin, of which lane i holds sum i, in which the target is reached.
  template <typename Target>
  __device__ static int choose(Wide sum, bool first, Target target_of, Found& found) {
    Wide upto = sum;
#pragma unroll
    for (int offset = 1; offset < kBins; offset *= 2) {
      const Wide lower = __shfl_up_sync(kAllLanes, upto, offset, kBins);
      if (int(threadIdx.x % kBins) >= offset) upto += lower;
    }
    if (first) found.target = target_of(__shfl_sync(kAllLanes, upto, kBins - 1));
    const unsigned reached = __ballot_sync(kAllLanes, found.before + upto >= found.target) & 0xffu;
    const int bin = reached ? __ffs(reached) - 1 : kBins - 1;
    found.at = __shfl_sync(kAllLanes, sum, bin);
    found.before += __shfl_sync(kAllLanes, upto - sum, bin);
    return bin;
  }

  template <typename Select, typename Body>
  __device__ void each_of_row(Select select, Body body) const {
    for (int token = slice_.first_of_thread(); token < slice_.end; token += Slice<T>::kStep) {
      const Packed<T> v = slice_.load(token);
#pragma unroll
      for (int i = 0; i < Slice<T>::kSize; ++i) {
        uint32_t key;
        if (token + i < slice_.end && select(v[i], token + i, key)) body(key);
      }
    }
  }

  template <typename Select, typename Visit>
  __device__ void gather(Select select, Visit visit) {
    count_ = 0;
    each_of_row(select, [&](uint32_t key) {
      visit(key);
      column_[count_++ * kSampleThreads] = key;
    });
  }

  // Visits what is in the column, and keeps what is still in question.
  template <typename Visit>
  __device__ void compact(Visit visit) {
    int kept = 0;
    for (int i = 0; i < count_; ++i) {
      const uint32_t key = column_[i * kSampleThreads];
      if (visit(key)) column_[kept++ * kSampleThreads] = key;
    }
    count_ = kept;
  }

  const Slice<T>& slice_;
  const Scores scores_;
  Cluster& cluster_;
  uint32_t* column_;  // this thread's: every kSampleThreads-th word
  int room_, count_ = 0;
};

// A call of its own, so that what the caller holds does not crowd the search's registers, nor the other way round.
template <typename T>
__device__ __noinline__ Border border_of(const Slice<T>& slice, const Scores& scores, Cluster& cluster, uint32_t* memory, int room,
                                         const Limits& limits, int likeliest) {
  return Search<T>(slice, scores, cluster, memory, room).border(limits, likeliest);
}

}  // namespace batchinfer
