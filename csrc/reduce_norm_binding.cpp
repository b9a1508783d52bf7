#include "reduce_norm.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "common/tensor.h"

namespace batchinfer {
namespace {

constexpr int64_t kHandleBytes = sizeof(cudaIpcMemHandle_t);

void require_handle(const Tensor& handle) {
  require(handle.is_contiguous() && handle.numel() == kHandleBytes && handle.scalar_type() == ScalarType::Byte && handle.is_cpu(),
          "a handle must be " + std::to_string(kHandleBytes) + " bytes on the CPU");
}

// Memory by itself, outside of PyTorch's pools: a handle stands for a whole allocation.
Tensor peer_memory_op(const Tensor& like, int64_t bytes) {
  Stream stream(like);
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "peer memory");
  peer_memory_clear(static_cast<char*>(memory), bytes, stream);
  const int64_t size = bytes, stride = 1;
  return torch::stable::from_blob(memory, {&size, 1}, {&stride, 1}, like.device(), ScalarType::Byte,
                                  [](void* data) { cudaFree(data); });
}

// Where y lies in the memory of a rank, and how much memory that is.
std::tuple<int64_t, int64_t> peer_layout_op(const Tensor& like, int64_t ranks, int64_t push_capacity, int64_t split_capacity,
                                            int64_t row_bytes) {
  const PeerLayout layout(ranks, push_capacity, split_capacity, row_bytes);
  return {layout.y, layout.bytes};
}

void peer_handle_op(const Tensor& memory, Tensor handle) {
  require_handle(handle);
  Stream stream(memory);
  cudaIpcMemHandle_t made;
  check(cudaIpcGetMemHandle(&made, const_cast<void*>(memory.data_ptr())), "this memory cannot be given to other processes");
  std::memcpy(pointer<char>(handle), &made, sizeof(made));
}

// The address at which the device of `like` sees the memory of a handle. It stays mapped as long as the process lives.
int64_t peer_map_op(const Tensor& like, const Tensor& handle) {
  require_handle(handle);
  Stream stream(like);
  cudaIpcMemHandle_t given;
  std::memcpy(&given, handle.data_ptr(), sizeof(given));
  void* mapped = nullptr;
  check(cudaIpcOpenMemHandle(&mapped, given, cudaIpcMemLazyEnablePeerAccess), "the memory of another GPU cannot be mapped");
  return reinterpret_cast<int64_t>(mapped);
}

Peers peers_of(const Tensor& addresses, int64_t rank, int64_t push_capacity, int64_t split_capacity) {
  require(addresses.dim() == 1 && addresses.is_contiguous() && addresses.is_cpu() && addresses.size(0) <= kMaxRanks &&
              addresses.scalar_type() == ScalarType::Long,
          "reduce_norm: addresses must be int64 on the CPU, of at most 8 ranks");
  Peers peers = {};
  for (int64_t i = 0; i < addresses.size(0); ++i) peers.memory[i] = reinterpret_cast<char*>(pointer<int64_t>(addresses)[i]);
  peers.rank = rank;
  peers.count = addresses.size(0);
  peers.push_capacity = push_capacity;
  peers.split_capacity = split_capacity;
  return peers;
}

void require_rows(const Tensor& tensor, const Tensor& like, const char* sentence) {
  require(same_shape(tensor, like) && tensor.scalar_type() == like.scalar_type() && tensor.is_contiguous() && in_vectors(tensor),
          sentence);
}

ReduceNorm checked(const Tensor& y, const Tensor& total, const Tensor& x, const std::optional<Tensor>& residual,
                   const Tensor& weight, double eps, int64_t capacity) {
  require(x.dim() == 2 && x.is_contiguous() && in_vectors(x), "reduce_norm: x must be [T, D], dense, its rows on 16 bytes");
  require_rows(y, x, "reduce_norm: y must be like x");
  require_rows(total, x, "reduce_norm: total must be like x");
  if (residual.has_value()) require_rows(*residual, x, "reduce_norm: residual must be like x");
  require(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.scalar_type() == x.scalar_type() && in_vectors(weight),
          "reduce_norm: weight must be [D] of x's element type");
  require(x.numel() * static_cast<int64_t>(x.element_size()) <= capacity, "reduce_norm: x is larger than the peer memory is made for");
  return {y.data_ptr(),
          total.data_ptr(),
          x.data_ptr(),
          residual.has_value() ? residual->data_ptr() : nullptr,
          weight.data_ptr(),
          static_cast<int>(x.size(0)),
          static_cast<int>(x.size(1)),
          static_cast<float>(eps)};
}

void push_reduce_norm_op(Tensor y, Tensor total, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                         double eps, const Tensor& addresses, int64_t rank, int64_t push_capacity, int64_t split_capacity) {
  const ReduceNorm norm = checked(y, total, x, residual, weight, eps, push_capacity);
  push_reduce_norm(norm, peers_of(addresses, rank, push_capacity, split_capacity), dtype_of(x), Stream(x));
}

void split_reduce_norm_op(Tensor y, Tensor total, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                          double eps, const Tensor& addresses, int64_t rank, int64_t push_capacity, int64_t split_capacity,
                          int64_t max_blocks) {
  const ReduceNorm norm = checked(y, total, x, residual, weight, eps, split_capacity);
  split_reduce_norm(norm, peers_of(addresses, rank, push_capacity, split_capacity), max_blocks, dtype_of(x), Stream(x));
}

}  // namespace
}  // namespace batchinfer

STABLE_TORCH_LIBRARY_FRAGMENT(batchinfer, m) {
  m.def("peer_memory(Tensor like, int bytes) -> Tensor");
  m.def("peer_layout(Tensor like, int ranks, int push_capacity, int split_capacity, int row_bytes) -> (int, int)");
  m.def("peer_handle(Tensor memory, Tensor(a!) handle) -> ()");
  m.def("peer_map(Tensor like, Tensor handle) -> int");
  const std::string sum =
      "_reduce_norm(Tensor(a!) y, Tensor(b!) total, Tensor x, Tensor? residual, Tensor weight, float eps, Tensor addresses, "
      "int rank, int push_capacity, int split_capacity";
  m.def(("push" + sum + ") -> ()").c_str());
  m.def(("split" + sum + ", int max_blocks) -> ()").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(batchinfer, CUDA, m) {
  m.impl("peer_memory", TORCH_BOX(&batchinfer::peer_memory_op));
  m.impl("peer_layout", TORCH_BOX(&batchinfer::peer_layout_op));
  m.impl("peer_handle", TORCH_BOX(&batchinfer::peer_handle_op));
  m.impl("peer_map", TORCH_BOX(&batchinfer::peer_map_op));
  m.impl("push_reduce_norm", TORCH_BOX(&batchinfer::push_reduce_norm_op));
  m.impl("split_reduce_norm", TORCH_BOX(&batchinfer::split_reduce_norm_op));
}
