// Squares of many tensors added up, and many tensors scaled, each in one launch per few dozen tensors.
//
// A block sums one chunk of one tensor; its sum goes to its own place and the places are added in order, in fp64: no
// atomics, the same bits every time. Nothing waits for the GPU. The file uses no part of torch but its number types.
#pragma once

#include "common.cuh"

namespace mn::cuda {

constexpr int kMaxTensors = 96;              // so that the table fits the 4 KB of a kernel's arguments
constexpr int64_t kChunkElements = 1 << 16;  // of one block: 256 KB in fp32

// Tensors of one launch, passed by value. first[i]: chunks of the tensors before the i-th.
struct TensorTable {
  void* data[kMaxTensors];
  int64_t elements[kMaxTensors];
  int32_t first[kMaxTensors + 1];
  int32_t count;
};

// The tensor that a chunk belongs to: the last one that starts at or before it.
__device__ inline int tensor_of(const TensorTable& table, int chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// 16 bytes of a tensor, read at once.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// The threads of a block go over a chunk: whole packs where it is aligned, single values elsewhere.
template <typename T, typename Pass>
__device__ inline void over_chunk(T* data, int64_t elements, const Pass& pass) {
  const int64_t packs = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? elements / Pack<T>::kSize : 0;
  Pack<T>* whole = reinterpret_cast<Pack<T>*>(data);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) pass(whole[i].value, Pack<T>::kSize);
  for (int64_t i = packs * Pack<T>::kSize + threadIdx.x; i < elements; i += kThreads) pass(data + i, 1);
}

// Block: one chunk. partial: [chunks of the launch].
template <typename T>
__global__ void square_sums(const TensorTable table, double* __restrict__ partial) {
  __shared__ double sum_of_warp[kWarps];
  const int chunk = blockIdx.x, tensor = tensor_of(table, chunk);
  const int64_t begin = (chunk - table.first[tensor]) * kChunkElements;
  const int64_t left = table.elements[tensor] - begin;
  double sum = 0.0;
  over_chunk(static_cast<T*>(table.data[tensor]) + begin, left < kChunkElements ? left : kChunkElements,
             [&](const T* values, int size) {
               for (int i = 0; i < size; ++i) {  // in fp64, so that no square overflows; memory is slower all the same
                 const double value = static_cast<double>(static_cast<float>(values[i]));
                 sum += value * value;
               }
             });
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sum_of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) sum += sum_of_warp[w];
    partial[blockIdx.x] = sum;
  }
}

// One block: all partial sums, in an order that only their number decides.
static __global__ void add_up(const double* __restrict__ partial, int64_t count, double* __restrict__ out) {
  __shared__ double sum_of_warp[kWarps];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sum_of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) sum += sum_of_warp[w];
    *out = sum;
  }
}

// Block: one chunk, scaled in place. A factor of 1, the usual case of clipping, moves no byte of the tensors.
template <typename T>
__global__ void scale(const TensorTable table, const float* __restrict__ factor_p) {
  const float factor = *factor_p;
  if (factor == 1.0f) return;
  const int chunk = blockIdx.x, tensor = tensor_of(table, chunk);
  const int64_t begin = (chunk - table.first[tensor]) * kChunkElements;
  const int64_t left = table.elements[tensor] - begin;
  over_chunk(static_cast<T*>(table.data[tensor]) + begin, left < kChunkElements ? left : kChunkElements,
             [&](T* values, int size) {
               for (int i = 0; i < size; ++i) values[i] = static_cast<T>(static_cast<float>(values[i]) * factor);
             });
}

}  // namespace mn::cuda
