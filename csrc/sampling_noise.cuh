// Counter-based random words and the Gumbel noise made of them, in float32.
#pragma once

#include <stdint.h>

namespace batchinfer {

constexpr float kMostNoise = 22.88f;   // -log(-log u) is below it for every u = (word + 0.5) / 2^32
constexpr float kLeastNoise = -3.14f;  // and above this

// Low and high word of a product. (Of 64-bit factors the compiler makes longer code.)
__device__ __forceinline__ uint2 multiply(uint32_t a, uint32_t b) {
  uint2 p;
  asm("{\n.reg .u64 p;\nmul.wide.u32 p, %2, %3;\nmov.b64 {%0, %1}, p;\n}" : "=r"(p.x), "=r"(p.y) : "r"(a), "r"(b));
  return p;
}

// Words for tokens 4 * group ... 4 * group + 3: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) of counter (group, position,
// 0, 0), with the seed as key.
__device__ __forceinline__ uint4 random_words(uint32_t group, uint32_t position, uint2 seed) {
  uint4 c = {group, position, 0, 0};
#pragma unroll
  for (uint32_t round = 0; round < 10; ++round) {
    const uint2 first = multiply(c.x, 0xD2511F53u), second = multiply(c.z, 0xCD9E8D57u);
    const uint32_t k0 = seed.x + round * 0x9E3779B9u, k1 = seed.y + round * 0xBB67AE85u;
    c = {second.y ^ c.y ^ k0, second.x, first.y ^ c.w ^ k1, first.x};
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

// Cheap bounds from above and below, some 1e-5 at fault: v < -log(1 - v), which is below v * (1 + v) up to v = 0.6.
__device__ __forceinline__ float most_noise(uint32_t word) {
  return -__logf(__uint2float_rd(~word) * (1.0f / 4294967296.0f));  // infinite for the last words
}
__device__ __forceinline__ float least_noise(uint32_t word) {
  const float rest = (__uint2float_ru(~word) + 1.0f) * (1.0f / 4294967296.0f);
  return rest < 0.6f ? -__logf(fmaf(rest, rest, rest)) : kLeastNoise;
}

}  // namespace batchinfer
