// Shared by the CPU kernels: stable-ABI includes, dtype dispatch, argument checks.
//
// Only torch's stable ABI is used, so one build serves every torch from TORCH_TARGET_VERSION on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

// One binary for every x86-64: the loader picks the widest vector unit when the library is opened.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MN_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MN_VECTORISED
#endif
// Bodies must end up inside the function that carries MN_VECTORISED, or they would be compiled for SSE2.
#define MN_INLINE inline __attribute__((always_inline))

namespace mn {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Sums are formed in fp32 for fp32, bf16 and fp16 data, in fp64 for fp64 data.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements below which a second thread costs more than it brings: torch's own GRAIN_SIZE (ATen/Parallel.h).
constexpr int64_t kGrainElements = 32768;

inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_item));
}

inline void check(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, has ", t.dim());
}

inline void check_like(const Tensor& t, const char* name, const Tensor& reference) {
  check(t, name, reference.dim());
  STD_TORCH_CHECK(t.scalar_type() == reference.scalar_type(), name, " has another dtype");
  for (int64_t i = 0; i < t.dim(); ++i) {
    STD_TORCH_CHECK(t.size(i) == reference.size(i), name, " has another shape");
  }
}

// Calls body with a value of the C++ type behind a floating dtype.
template <typename Body>
void dispatch(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, " takes float32, float64, bfloat16 or float16");
  }
}

}  // namespace mn
