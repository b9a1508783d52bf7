// Choosing tokens from logits: `ops.greedy` and `ops.sample`. Neither writes to the logits nor asks the host for anything.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace batchinfer {

struct Logits {
  const void* data;
  int64_t rows, stride;  // in elements; rows need not begin on 16 bytes, which is only slower
  int size;              // of the vocabulary
  Dtype dtype;
};

// How each row is drawn, [rows] each; see `reference_sampling.sample`.
struct Drawing {
  const double *temperature, *top_p, *min_p;
  const int32_t *top_k, *positions;
  const int64_t* seeds;
};

// broken[row] = the row has a NaN. Its token is then the first NaN; otherwise the highest logit's, of equals the lowest id.
// splits: how many blocks share a row, a power of two up to 8 (ignored before Hopper); 0 chooses. It changes no result.
void greedy(int32_t* token_ids, bool* broken, const Logits& logits, int splits, cudaStream_t stream);

// The same for rows with temperature 0; the others are drawn with Gumbel noise from what top-k, top-p and min-p leave.
void sample(int64_t* token_ids, bool* broken, const Logits& logits, const Drawing& drawing, int splits, cudaStream_t stream);

}  // namespace batchinfer
