// The warpgroups of Hopper's tile attention that multiply.
#pragma once

#include "tile_attention_shared.cuh"

namespace batchinfer {

enum Meeting { kTurn = 1, kWithin = 3, kBoth = 5 };  // hardware barriers; the first two one per warpgroup

// Value j of lane i of a quad becomes value i of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&values)[4], uint32_t lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t got = __shfl_xor_sync(kAllLanes, lane & bit ? values[j] : values[j | bit], bit);
      values[j] = lane & bit ? got : values[j];
      values[j | bit] = lane & bit ? values[j | bit] : got;
    }
}

// What a thread of a multiplying warpgroup holds: two rows of the tile, 8 apart, and of each the columns 8 j + 2 (lane % 4) and
// the one after it.
template <typename T, int kHeadDim>
struct Consumer {
  static constexpr int kScores = kKeys / 2, kOuts = kHeadDim / 2, kRowStep = Shared<kHeadDim>::kRowStep;
  const Call& call;
  Shared<kHeadDim>& shared;
  const uint32_t group, thread, lane, scratch;
  Ring<Shared<kHeadDim>::kStages> k_ring, v_ring;
  Ring<Shared<kHeadDim>::kQueryStages> q_ring;
  float o[kOuts], s[kScores], top[2], sum[2];
  uint32_t p[kScores / 2];
  int low[2], high[2], clear_low, clear_high;  // positions that each row sees, and that all rows see
  bool split;                                  // the warpgroups hold the same rows
  uint64_t q_operand;

  __device__ __forceinline__ Consumer(const Call& call, Shared<kHeadDim>& shared)
      : call(call), shared(shared), group(threadIdx.x / kWarpgroup - 1), thread(threadIdx.x % kWarpgroup),
        lane(threadIdx.x % kWarp), scratch(shared_address(shared.scratch + threadIdx.x - kWarpgroup)) {}

  template <int kDepth>
  __device__ __forceinline__ void release(RingBarriers<kDepth>& barriers, Ring<kDepth>& ring) {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&barriers.free[ring.place]));
    ring.advance();
  }
  // Lets the other warpgroup have a step's keys and values.
  __device__ __forceinline__ void leave_step() {
    k_ring.wait_full(shared.keys);
    release(shared.keys, k_ring);
    v_ring.wait_full(shared.values);
    release(shared.values, v_ring);
  }

  __device__ __forceinline__ void multiply_keys() {
    const uint64_t k_operand = describe(shared_address(shared.k[k_ring.place]), kRowStep);
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const uint64_t offset = (i / 4 * kAtomBytes + i % 4 * 32) >> 4;
      multiply_shared<T>(s, q_operand + offset, k_operand + offset, i > 0);
    }
    products_commit();
  }
  __device__ __forceinline__ void multiply_values() {
    const uint64_t v_operand = describe(shared_address(shared.v[v_ring.place]), kRowStep);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      const uint32_t(&a)[4] = *reinterpret_cast<const uint32_t(*)[4]>(&p[4 * i]);
      multiply_registers<T>(o, a, v_operand + (i * 2 * kRowStep >> 4));
    }
    products_commit();
  }

  __device__ __forceinline__ void mask(int begin) {
    if (begin >= clear_low && begin + kKeys - 1 <= clear_high) return;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int position = begin + i / 4 * 8 + int(lane % 4) * 2 + i % 2, row = i / 2 % 2;
      if (position < low[row] || position > high[row]) s[i] = -INFINITY;
    }
  }
  // Turns scores into powers, and gives by how much earlier sums fade.
  __device__ __forceinline__ void take_powers(float (&fade)[2]) {
    const float scale = call.scale_log2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = top[row];
#pragma unroll
      for (int i = row * 2; i < kScores; i += 4) most = fmaxf(most, fmaxf(s[i], s[i + 1]));
      most = quad_max(most);
      const float shift = most == -INFINITY ? 0.0f : most * scale;
      fade[row] = exp2_fast(top[row] * scale - shift);
      top[row] = most;
      float added = 0.0f;
#pragma unroll
      for (int i = row * 2; i < kScores; i += 4) {
        s[i] = exp2_fast(s[i] * scale - shift);
        s[i + 1] = exp2_fast(s[i + 1] * scale - shift);
        added += s[i] + s[i + 1];
      }
      sum[row] = sum[row] * fade[row] + added;
    }
  }
  __device__ __forceinline__ void pack_powers() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
  }

  // Zeroes the values from kv_end to the end of its box: they are not the sequence's, and 0 * NaN is NaN.
  __device__ __forceinline__ void clear_values(int begin, int kv_end) {
    const int shift = call.boxes.box_shift, from = kv_end - begin, to = min(kKeys, ((from - 1 >> shift) + 1) << shift);
    if (from >= to || from < 0) return;
    constexpr int kPieces = kHeadDim / 8;
    char* tile = shared.v[v_ring.place];
    for (int i = from * kPieces + thread; i < to * kPieces; i += kWarpgroup)
      *reinterpret_cast<int4*>(tile + Shared<kHeadDim>::place(i / kPieces, i % kPieces)) = make_int4(0, 0, 0, 0);
    publish_shared();
    meet(kWithin + group, kWarpgroup);
  }

  __device__ __forceinline__ void attend(Steps steps, int kv_end) {
    const int stride = split ? 2 : 1;
    int step = steps.count - 1;
    if (split && group == 1) {
      leave_step();
      --step;
    }
    if (step >= 0) {
      float fade[2];
      k_ring.wait_full(shared.keys);
      products_begin();
      multiply_keys();
      products_wait<0>();
      settle(s);
      release(shared.keys, k_ring);
      mask(steps.begin + step * kKeys);
      take_powers(fade);
      pack_powers();
      bool last = step == steps.count - 1;
      for (int next = step - stride; next >= 0; next -= stride) {
        v_ring.wait_full(shared.values);
        if (last) clear_values(steps.begin + (steps.count - 1) * kKeys, kv_end);
        last = false;
        const auto v_now = v_ring;
        if (split) {
          v_ring.advance();
          leave_step();
        }
        k_ring.wait_full(shared.keys);
        if (!split) meet(kTurn + group, kConsumers);
        settle(o);
        settle(p);
        products_begin();
        multiply_keys();
        const auto v_next = v_ring;
        v_ring = v_now;
        multiply_values();
        if (!split) pass(kTurn + 1 - group, kConsumers);
        products_wait<1>();
        settle(s);
        release(shared.keys, k_ring);
        mask(steps.begin + next * kKeys);
        take_powers(fade);
        finish(sum[0] + sum[1], scratch);  // while the values are multiplied, not after
        products_wait<0>();
        settle(o);
        release(shared.values, v_ring);
        if (split) v_ring = v_next;
#pragma unroll
        for (int i = 0; i < kOuts; ++i) o[i] *= fade[i / 2 % 2];
        pack_powers();
        step = next;
      }
      v_ring.wait_full(shared.values);
      if (last) clear_values(steps.begin + (steps.count - 1) * kKeys, kv_end);
      settle(o);
      settle(p);
      products_begin();
      multiply_values();
      products_wait<0>();
      settle(o);
      release(shared.values, v_ring);
      if (split && step == 1) leave_step();
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] = quad_sum(sum[row]);
  }

  // Adds the second warpgroup's part to the first's, through the memory of the queries.
  __device__ __forceinline__ void merge() {
    float* outs = reinterpret_cast<float*>(shared.q[q_ring.place]);
    const int row = thread / kWarp * 16 + lane / 4;
    meet(kBoth, kConsumers);
    if (group == 1) {
#pragma unroll
      for (int i = 0; i < kOuts; ++i) outs[i * kWarpgroup + thread] = o[i];
      if (lane % 4 == 0)
        for (int half = 0; half < 2; ++half) {
          shared.tops[row + half * 8] = top[half];
          shared.sums[row + half * 8] = sum[half];
        }
    }
    meet(kBoth, kConsumers);
    if (group == 1) return;
    float mine[2], other[2];
    for (int half = 0; half < 2; ++half) {
      const float their_top = shared.tops[row + half * 8], most = fmaxf(top[half], their_top);
      const float scale = call.scale_log2, shift = most == -INFINITY ? 0.0f : most * scale;
      mine[half] = exp2_fast(top[half] * scale - shift);
      other[half] = exp2_fast(their_top * scale - shift);
      sum[half] = sum[half] * mine[half] + shared.sums[row + half * 8] * other[half];
      top[half] = most;
    }
#pragma unroll
    for (int i = 0; i < kOuts; ++i) o[i] = o[i] * mine[i / 2 % 2] + outs[i * kWarpgroup + thread] * other[i / 2 % 2];
  }

  __device__ __forceinline__ void write_partial(int place, int half) {
    if (place < 0) return;
    const float inverse = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
    float* to = call.partial_out + int64_t(place) * kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int i = half * 2; i < kOuts; i += 4)
      *reinterpret_cast<float2*>(to + i / 4 * 8) = make_float2(o[i] * inverse, o[i + 1] * inverse);
    if (lane % 4 == 0)
      call.partial_lse[place] = sum[half] == 0.0f ? -INFINITY : top[half] * call.scale_log2 + log2f(sum[half]);
  }
  __device__ __forceinline__ void write(int place, int half) {
    const float inverse = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
    T* to = static_cast<T*>(call.out) + int64_t(place) * kHeadDim + lane % 4 * 8;
#pragma unroll
    for (int i = half * 2; i < kOuts; i += 16) {
      uint32_t piece[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) piece[j] = pack_pair<T>(o[i + 4 * j] * inverse, o[i + 4 * j + 1] * inverse);
      transpose_quad(piece, lane);
      if (place >= 0) *reinterpret_cast<uint4*>(to + i / 16 * 32) = make_uint4(piece[0], piece[1], piece[2], piece[3]);
    }
  }

  __device__ __forceinline__ void run() {
    if (group == 1) pass(kTurn, kConsumers);
    while (true) {
      q_ring.wait_full(shared.queries);
      const Work& work = shared.work[q_ring.place];
      const int rows = work.rows, window = call.window, kv_begin = work.kv_begin, kv_end = work.kv_end;
      if (rows == 0) return;
      split = rows <= kTileRows / 2;
      const int first_row = split ? 0 : group * (kTileRows / 2), pack = work.pack, q_position = work.q_position;
      const bool partial = work.partial;
      int places[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + thread / kWarp * 16 + half * 8 + lane / 4, position = q_position + row / pack;
        places[half] = row < rows ? work.places[row] : -1;
        low[half] = window > 0 ? max(kv_begin, position - window + 1) : kv_begin;
        high[half] = min(kv_end - 1, position);
        top[half] = -INFINITY;
        sum[half] = 0.0f;
      }
      const int last_position = q_position + (min(rows, first_row + kTileRows / 2) - 1) / pack;
      clear_low = window > 0 ? max(kv_begin, last_position - window + 1) : kv_begin;
      clear_high = min(kv_end - 1, q_position + first_row / pack);
      q_operand = describe(shared_address(shared.q[q_ring.place]) + first_row / 8 * kRowStep, kRowStep);
#pragma unroll
      for (int i = 0; i < kOuts; ++i) o[i] = 0.0f;
      attend(Steps(kv_begin, kv_end, call.boxes.box_shift), kv_end);
      if (split) merge();
      release(shared.queries, q_ring);
      if (split && group == 1) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) partial ? write_partial(places[half], half) : write(places[half], half);
    }
  }
};

}  // namespace batchinfer
