// How kernels are launched: on the caller's stream, errors reported at once, and on Hopper as programmatic dependents.
//
// A programmatic dependent launch lets a kernel start while the one before it in the stream still runs: it may load what
// does not depend on that kernel (weights) and must call `wait_for_previous()` (device.cuh) before it touches anything else,
// to read or to write. It returns only when the previous kernel has ended and its writes are visible, and that kernel had
// itself waited, so order in the stream stays what it seems. EVERY kernel launched this way must call it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace batchinfer {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A fact of the current device, asked once per device.
inline int device_attribute(cudaDeviceAttr attribute) {
  constexpr int kDevices = 64, kAttributes = 256;
  static int known[kDevices][kAttributes];  // value + 1; 0: not asked yet. Two threads that ask at once store the same.
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < kDevices && known[device][attribute] != 0) return known[device][attribute] - 1;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  if (device < kDevices) known[device][attribute] = value + 1;
  return value;
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline bool is_hopper_or_later() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// Launches `kernel` with `smem` bytes of dynamic shared memory (more than 48 KB is asked for here).
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (smem > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = is_hopper_or_later() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace batchinfer
