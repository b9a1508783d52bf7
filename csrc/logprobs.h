// Log-probabilities of chosen and of likeliest tokens: `ops.log_probabilities`.
#pragma once

#include "sampling.h"

namespace batchinfer {

constexpr int kMostLikeliest = 1024;

// [rows] and [rows, k] as `reference_logprobs.LogProbabilities` has them.
struct LogProbabilities {
  float* chosen;
  int64_t *ranks, *top_ids;
  float* top;
};

// k: at most kMostLikeliest and the vocabulary. A row with NaN gives NaN, rank 1 and the first ids.
void log_probabilities(const LogProbabilities& told, const Logits& logits, const int64_t* token_ids, int k, int splits,
                       cudaStream_t stream);

}  // namespace batchinfer
