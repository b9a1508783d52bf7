// Counter-based random words and the Gumbel noise made of them, in float32.
#pragma once

#include <stdint.h>

namespace batchinfer {

constexpr float kMostNoise = 22.88f;   // -log(-log u) is below it for every u = (word + 0.5) / 2^32
constexpr float kLeastNoise = -3.14f;  // and above this

// Words for tokens 4 * group ... 4 * group + 3: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) of counter (group, position, 0, 0).
__device__ __forceinline__ uint4 random_words(uint32_t group, uint32_t position, uint64_t seed) {
  uint4 c = {group, position, 0, 0};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c.x) * 0xD2511F53u, second = uint64_t(c.z) * 0xCD9E8D57u;
    c = {uint32_t(second >> 32) ^ c.y ^ k0, uint32_t(second), uint32_t(first >> 32) ^ c.w ^ k1, uint32_t(first)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// -log(-log u) for u = (word + 0.5) / 2^32. Near 1, float32 has no digits left for u but all of them for 1 - u, which is exact
// in integers: 1 - u = (~word + 0.5) / 2^32.
__device__ __forceinline__ float gumbel_noise(uint32_t word) {
  constexpr float kUnit = 1.0f / 4294967296.0f;
  const float u = fmaf(__uint2float_rn(word), kUnit, kUnit / 2), rest = fmaf(__uint2float_rn(~word), kUnit, kUnit / 2);
  return -logf(word < 0x80000000u ? -logf(u) : -log1pf(-rest));
}

// A cheap bound from above, some 1e-5 at fault: -log u > 1 - u. Infinite for the last words.
__device__ __forceinline__ float most_noise(uint32_t word) {
  return -__logf(__uint2float_rd(~word) * (1.0f / 4294967296.0f));
}

}  // namespace batchinfer
