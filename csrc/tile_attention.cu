// Chooses how tile attention is computed.
#include "tile_attention.h"

namespace batchinfer {

void tile_attention(const TileAttention& call, cudaStream_t stream) {
  if (tile_attention_wgmma_takes(call))
    tile_attention_wgmma(call, stream);
  else
    tile_attention_mma(call, stream);
}

}  // namespace batchinfer
