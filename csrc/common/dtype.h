// Element types as launchers take them, and the way from there to a template argument.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

namespace batchinfer {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// Calls `body` with a value of the element type: `dispatch(dtype, [&](auto zero) { using T = decltype(zero); ... })`.
template <typename Body>
void dispatch(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float{});
    case Dtype::kFloat16: return body(__half{});
    case Dtype::kBFloat16: return body(__nv_bfloat16{});
  }
  throw std::invalid_argument("no such element type");
}

// The same for the types that tensor cores multiply.
template <typename Body>
void dispatch_half(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::kFloat16: return body(__half{});
    case Dtype::kBFloat16: return body(__nv_bfloat16{});
    default: throw std::invalid_argument("this kernel takes float16 and bfloat16");
  }
}

}  // namespace batchinfer
