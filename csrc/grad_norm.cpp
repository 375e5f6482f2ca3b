// The sum of the squares of many tensors, in fp64, reading each value once.
#include "common.h"

namespace mn {
namespace {

// Chunks have a sum of their own, so that the result has the same bits for any number of threads.
constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kChunksOfThread = 16;  // 2 MB in fp32: a thread wakes up in the time that one reads so much (own choice)

template <typename T>
MN_INLINE double sum_of(const T* __restrict data, int64_t elements) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < elements; ++i) {
    const double value = static_cast<double>(data[i]);
    sum += value * value;
  }
  return sum;
}

// target_clones does not apply to templates; these carry it.
MN_VECTORISED double chunk_sum(const float* data, int64_t n) { return sum_of(data, n); }
MN_VECTORISED double chunk_sum(const double* data, int64_t n) { return sum_of(data, n); }
MN_VECTORISED double chunk_sum(const torch::headeronly::BFloat16* data, int64_t n) { return sum_of(data, n); }
MN_VECTORISED double chunk_sum(const torch::headeronly::Half* data, int64_t n) { return sum_of(data, n); }

struct Chunk {
  const Tensor* tensor;
  int64_t begin, elements;
};

Tensor square_sum(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "square_sum needs a tensor");
  std::vector<Chunk> chunks;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "square_sum takes contiguous tensors on the CPU");
    for (int64_t begin = 0; begin < tensor.numel(); begin += kChunk) {
      chunks.push_back({&tensor, begin, std::min(kChunk, tensor.numel() - begin)});
    }
  }
  std::vector<double> sums(chunks.size());
  parallel_for(0, chunks.size(), kChunksOfThread, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Chunk& chunk = chunks[i];
      dispatch(chunk.tensor->scalar_type(), "square_sum", [&](auto zero) {
        const auto* data = static_cast<const decltype(zero)*>(chunk.tensor->const_data_ptr());
        sums[i] = chunk_sum(data + chunk.begin, chunk.elements);
      });
    }
  });
  Tensor out = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  double sum = 0.0;
  for (const double part : sums) sum += part;
  *static_cast<double*>(out.mutable_data_ptr()) = sum;
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) { m.def("square_sum(Tensor[] tensors) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CPU, m) { m.impl("square_sum", TORCH_BOX(&square_sum)); }

}  // namespace
}  // namespace mn
