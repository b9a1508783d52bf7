// What one warp of decode attention does with 16 tokens of one KV head. They lie together in the cache; it loads them 16 bytes a
// lane, past shared memory, straight into the registers from which tensor cores multiply. Keys and values are the large operand A
// (16 rows), the query heads that share them the small operand B (8 columns): S^T = K Q^T, then O^T = V^T P^T.
//
// Which contraction index is which dimension or token is free, so a lane's 16 bytes are its fragments as they come:
// - keys: row g is token g (and g + 8), and k-steps 2i and 2i + 1 are the dimensions 32i + 8t .. 32i + 8t + 7 of lane t;
// - values: lane (g, t) holds the dimensions 64c + 8g .. + 7 of tokens 2t, 2t+1, 2t+8, 2t+9; rows g and g + 8 of tile 4c + j are
//   the dimensions 64c + 8g + 2j and the one after, and pairs of tokens are put together by byte permutations.
//
// With few query heads per KV head (kHeads < 8) the columns of B would be mostly padding, and accumulators with them. Instead
// kReplicas = 8 / kHeads tiles share one accumulator: tile i multiplies only the columns of replica i % kReplicas, the others
// of its B are zero. So scores come as sums over replicas, and outputs of a tile lie in the columns of its replica.
#pragma once

#include "common/device.cuh"
#include "common/fragments.cuh"

namespace batchinfer {
namespace {

constexpr int kTokens = 16;  // of a chunk: what a warp takes at once

// One KV head, and the query heads that share it: kHeads of them, padding included (a power of two up to 16).
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

}  // namespace
}  // namespace batchinfer
