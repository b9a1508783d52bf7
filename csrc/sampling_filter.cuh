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

// exp(-magnitude) in units of 2^-44: what is lost could not be drawn anyway, and 2^18 tokens of the highest fit.
__device__ __forceinline__ Wide mass_of(uint32_t magnitude) {
  const uint32_t bits = __float_as_uint(expf(-__uint_as_float(magnitude)));
  const uint32_t exponent = bits >> 23, shift = 127 - exponent;
  return Wide((bits & 0x7fffffu) | 0x800000u) << 21 >> (shift < 63 ? shift : 63);
}

// What a search is left with: the first key at which the sum reaches the target, the sum before it, and its own.
struct Found {
  uint32_t key;
  Wide before, at, target;
};

template <typename T>
class Search {
 public:
  __device__ Search(const Slice<T>& slice, float max, float heat, Cluster& cluster, uint32_t* memory, int room)
      : slice_(slice), max_(max), heat_(heat), cluster_(cluster), column_(memory + threadIdx.x), room_(room) {}

  // The border of a row of `size` tokens; likeliest: the token with score 0, which stays in any case.
  __device__ Border border(int top_k, bool cuts_mass, float top_p, float min_p, int size, int likeliest) {
    Border border = {kAnyMagnitude, kAnyToken};
    if (top_k > 0 && top_k < size) border.magnitude = kth_magnitude(top_k);
    if (cuts_mass) border = border_of_mass(border.magnitude, top_p);
    if (min_p > 0) border = nearer(border, {least_likely(min_p), kAnyToken});
    return border.admits(0, likeliest) ? border : Border{0, likeliest};
  }

 private:
  __device__ static Border nearer(Border a, Border b) { return b.admits(a.magnitude, a.token) ? a : b; }

  __device__ uint32_t kth_magnitude(int k) {
    const auto all = [](uint32_t magnitude, int, uint32_t& key) { return key = magnitude, true; };
    return find(all, [](uint32_t) { return Wide(1); }, [k](Wide) { return Wide(k); }, 0).key;
  }

  // The last token before which less than top_p of the mass of the magnitudes up to `limit` lies.
  __device__ Border border_of_mass(uint32_t limit, float top_p) {
    const auto left = [limit](uint32_t magnitude, int, uint32_t& key) { return key = magnitude, magnitude <= limit; };
    const auto target = [top_p](Wide total) { return Wide(fmax(1.0, ceil(double(top_p) * double(total)))); };
    const Found found = find(left, mass_of, target, 0);
    const Wide each = mass_of(found.key), equals = found.at / (each > 0 ? each : 1);
    const Wide needed = (found.target - found.before + each - 1) / (each > 0 ? each : 1);
    if (needed >= equals) return {found.key, kAnyToken};
    const auto equal = [found](uint32_t magnitude, int token, uint32_t& key) { return key = token, magnitude == found.key; };
    const int bits = 32 - __clz(slice_.size);
    return {found.key, int(find(equal, [](uint32_t) { return Wide(1); }, [needed](Wide) { return needed; }, bits).key)};
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

  // select(magnitude, token, key) says whether a token takes part, and with which key. bits: of the keys; 0: they are magnitudes.
  template <typename Select, typename Weigh, typename Target>
  __device__ Found find(Select select, Weigh weigh, Target target_of, int bits) {
    const bool magnitudes = bits == 0;
    uint32_t low = 0, high = magnitudes ? kAnyMagnitude : (1u << bits) - 1;
    int shift = bits > 3 ? bits - 3 : 0;
    bool octaves = magnitudes;  // the first pass over magnitudes: up to 1/4, six octaves, from 16 on
    Found found = {0, 0, 0, 0};
    if (room_ > 0) gather(select);
    for (bool first = true;; first = false) {
      Wide sums[kParts] = {};
      each(select, [&](uint32_t key) {
        if (key < low || key > high) return;
        const int bin = octaves ? min(max(int(key >> 23) - 124, 0), 7) : int((key - low) >> shift);
        const Wide weight = weigh(key);
#pragma unroll
        for (int i = 0; i < kParts; ++i) sums[i] += i == bin ? weight : 0;
      });
      const Wide sum = cluster_.sum(sums);
      const int bin = choose(sum, first, target_of, found);
      if (octaves) {
        low = bin == 0 ? 0 : uint32_t(bin + 124) << 23;
        high = bin == 7 ? kAnyMagnitude : (uint32_t(bin + 125) << 23) - 1;
        bits = bin == 0 || bin == 7 ? 30 : 23;
        octaves = false;
      } else {
        low += uint32_t(bin) << shift;
        high = low + (1u << shift) - 1;
        bits = shift;
      }
      if (bits == 0) break;
      shift = bits > 3 ? bits - 3 : 0;
      if (room_ > 0) compact(low, high);
    }
    found.key = low;
    return found;
  }

  // The bin, of which lane i holds sum i, in which the target is reached.
  template <typename Target>
  __device__ static int choose(Wide sum, bool first, Target target_of, Found& found) {
    Wide upto = sum;
#pragma unroll
    for (int offset = 1; offset < kParts; offset *= 2) {
      const Wide lower = __shfl_up_sync(kAllLanes, upto, offset, kParts);
      if (int(threadIdx.x % kParts) >= offset) upto += lower;
    }
    if (first) found.target = target_of(__shfl_sync(kAllLanes, upto, kParts - 1));
    const unsigned reached = __ballot_sync(kAllLanes, found.before + upto >= found.target) & 0xffu;
    const int bin = reached ? __ffs(reached) - 1 : kParts - 1;
    found.at = __shfl_sync(kAllLanes, sum, bin);
    found.before += __shfl_sync(kAllLanes, upto - sum, bin);
    return bin;
  }

  // body(key) for every token of this thread that is still in question, and perhaps for others.
  template <typename Select, typename Body>
  __device__ void each(Select select, Body body) const {
    if (room_ > 0) {
      for (int i = 0; i < count_; ++i) body(column_[i * kSampleThreads]);
      return;
    }
    each_of_row(select, body);
  }

  template <typename Select, typename Body>
  __device__ void each_of_row(Select select, Body body) const {
    for (int token = slice_.first_of_thread(); token < slice_.end; token += Slice<T>::kStep) {
      const Packed<T> v = slice_.load(token);
#pragma unroll
      for (int i = 0; i < Slice<T>::kSize; ++i) {
        uint32_t key;
        const uint32_t magnitude = magnitude_of(__fdiv_rn(v[i] - max_, heat_));
        if (token + i < slice_.end && select(magnitude, token + i, key)) body(key);
      }
    }
  }

  template <typename Select>
  __device__ void gather(Select select) {
    count_ = 0;
    each_of_row(select, [&](uint32_t key) { column_[count_++ * kSampleThreads] = key; });
  }

  __device__ void compact(uint32_t low, uint32_t high) {
    int kept = 0;
    for (int i = 0; i < count_; ++i) {
      const uint32_t key = column_[i * kSampleThreads];
      if (key >= low && key <= high) column_[kept++ * kSampleThreads] = key;
    }
    count_ = kept;
  }

  const Slice<T>& slice_;
  const float max_, heat_;
  Cluster& cluster_;
  uint32_t* column_;  // this thread's: every kSampleThreads-th word
  int room_, count_ = 0;
};

}  // namespace batchinfer
