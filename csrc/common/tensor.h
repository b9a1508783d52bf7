// What bindings do with tensors: check them with sentences, take their pointers, find the stream. Only *_binding.cpp include this.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "dtype.h"
#include "launch.h"

// It lives in libtorch_cuda; weak, so that the file also loads into a CPU build of PyTorch, where no kernel is ever called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace batchinfer {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: throw std::invalid_argument("element type must be float32, float16 or bfloat16");
  }
}

inline void require_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  require(tensor.scalar_type() == dtype, std::string(name) + " has another element type than expected");
}

// The last dimension lies densely, and every row begins on 16 bytes: what 16-byte accesses along it need.
inline void require_vectors(const Tensor& tensor, const char* name) {
  const int64_t per_vector = 16 / static_cast<int64_t>(tensor.element_size());
  require(tensor.dim() >= 1 && tensor.stride(tensor.dim() - 1) == 1, std::string(name) + ": the last dimension must be dense");
  require(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, std::string(name) + " must begin on 16 bytes");
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i)
    require(tensor.size(i) <= 1 || tensor.stride(i) % per_vector == 0,
            std::string(name) + ": strides must be multiples of 16 bytes");
}

// Whether every row along the last dimension begins and ends on 16 bytes: `require_vectors` as a question, rows being whole.
inline bool in_vectors(const Tensor& tensor) {
  const int64_t per_vector = 16 / static_cast<int64_t>(tensor.element_size()), last = tensor.dim() - 1;
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0 || tensor.size(last) % per_vector != 0) return false;
  for (int64_t i = 0; i < last; ++i)
    if (tensor.size(i) > 1 && tensor.stride(i) % per_vector != 0) return false;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.data_ptr()));
}

// Makes the tensor's device current and gives the stream that PyTorch launches on.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    require(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
    void* stream = nullptr;
    require(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "PyTorch gave no CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace batchinfer
