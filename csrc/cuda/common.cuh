// What the kernels share, and the few words that tests/ops/cuda_on_cpu.h defines otherwise.
#pragma once

#include <cstdint>

#ifndef MN_DYNAMIC_SHARED
#define MN_DYNAMIC_SHARED(Type, name)                        \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  Type* name = reinterpret_cast<Type*>(name##_raw)
#endif

namespace mn::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <typename Number>
__device__ inline Number warp_sum(Number value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

}  // namespace mn::cuda
