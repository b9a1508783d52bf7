// Thread block clusters (Hopper): blocks that run at the same time and read each other's shared memory.
#pragma once

#include <stdint.h>

#include "launch.h"

namespace batchinfer {

// What threads of the cluster wrote before, to their own shared memory, is seen by all of them after. All threads must come.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Two or four floats, read at once.
template <int kSize>
struct alignas(kSize * sizeof(float)) Floats {
  float values[kSize];
};

// What lies at the place of `mine` (in shared memory) in the block of that rank of the cluster.
template <int kSize>
__device__ __forceinline__ Floats<kSize> load_remote(const Floats<kSize>* mine, int rank) {
  static_assert(kSize == 2 || kSize == 4);
  Floats<kSize> y = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  if constexpr (kSize == 4)
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(y.values[0]), "=f"(y.values[1]), "=f"(y.values[2]), "=f"(y.values[3])
                 : "r"(remote));
  else
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(y.values[0]), "=f"(y.values[1]) : "r"(remote));
#endif
  return y;
}

// As `launch`, in clusters of `ranks` blocks beside each other in y. One rank: no clusters.
template <typename... Parameters, typename... Arguments>
void launch_clusters(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int ranks, size_t smem, cudaStream_t stream,
                     Arguments&&... arguments) {
  if (ranks == 1) return launch(name, kernel, grid, block, smem, stream, arguments...);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (smem > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)), name);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = attributes[1].val.clusterDim.z = 1;
  attributes[1].val.clusterDim.y = ranks;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace batchinfer
