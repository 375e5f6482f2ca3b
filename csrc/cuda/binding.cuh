// Between torch's stable interface and the kernels: streams, checks, launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>
#include <vector>

// Weak, so that the library can be opened beside a CPU build of torch, where nothing calls it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace mn::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " could not be launched: ", cudaGetErrorString(error));
}

inline void check(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a GPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, has ", tensor.dim());
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline unsigned blocks(int64_t items, int64_t of_block) {
  const int64_t count = (items + of_block - 1) / of_block;
  STD_TORCH_CHECK(count <= 0x7FFFFFFF, "too many elements for one launch");
  return static_cast<unsigned>(count);
}

// Calls body with a value of the C++ type behind a floating dtype.
template <typename Body>
void dispatch(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, " takes float32, bfloat16 or float16 on a GPU");
  }
}

}  // namespace mn::cuda
