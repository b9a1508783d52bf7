#include "activation.h"
#include "common/tensor.h"

namespace batchinfer {
namespace {

void silu_and_mul_op(Tensor out, const Tensor& gate_up) {
  require(gate_up.dim() == 2 && out.dim() == 2 && out.size(0) == gate_up.size(0) && 2 * out.size(1) == gate_up.size(1),
          "silu_and_mul: gate_up must be [T, 2 * I] and out [T, I]");
  require(out.is_contiguous() && out.scalar_type() == gate_up.scalar_type(),
          "silu_and_mul: out must be contiguous and of gate_up's element type");
  require(gate_up.stride(1) == 1, "silu_and_mul: the last dimension of gate_up must be dense");
  const bool aligned = in_vectors(gate_up) && in_vectors(out);
  silu_and_mul(out.data_ptr(), gate_up.data_ptr(), out.size(0), out.size(1), gate_up.stride(0), aligned, dtype_of(gate_up),
               Stream(out));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) { m.def("silu_and_mul(Tensor(a!) out, Tensor gate_up) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) { m.impl("silu_and_mul", TORCH_BOX(&batchinfer::silu_and_mul_op)); }
