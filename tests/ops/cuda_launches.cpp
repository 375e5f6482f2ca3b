// The launches of csrc/cuda/*.cu over tests/ops/cuda_on_cpu.h, for ctypes. Types: 0 float, 1 bfloat16, 2 half.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda_on_cpu.h"

#include "expert_choice.cuh"
#include "grad_norm.cuh"

using cuda_on_cpu::launch;
using namespace mn::cuda;

template <typename Body>
static void with_type(int type, const Body& body) {
  if (type == 0) body(float{});
  if (type == 1) body(torch::headeronly::BFloat16{});
  if (type == 2) body(torch::headeronly::Half{});
}

static int64_t parts(int64_t items, int64_t of_block) { return (items + of_block - 1) / of_block; }

extern "C" void expert_choice(int type, const void* logits, int64_t* index, void* weight, void* cut, void* total,
                              void* score, void* won, uint64_t* scratch, int64_t images, int tokens, int experts,
                              int capacity, int sorted, bool use_sigmoid, float route_scale) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tiles = parts(tokens, kTileTokens), rows = images * experts;
    auto* cuts = static_cast<Cut*>(cut);
    auto* scores_p = static_cast<T*>(score);
    launch(images * tiles, kThreads, experts * (kTileTokens + 1) * sizeof(float), [&] {
      scores(static_cast<const T*>(logits), scores_p, tokens, experts, tiles, use_sigmoid);
    });
    launch(rows, kThreads, scratch == nullptr ? sorted * sizeof(uint64_t) : 0, [&] {
      choose(scores_p, index, static_cast<T*>(won), cuts, scratch, tokens, capacity, sorted);
    });
    launch(parts(images * tokens, kThreads), kThreads, 0,
           [&] { totals(scores_p, cuts, static_cast<T*>(total), images, tokens, experts); });
    launch(parts(rows * capacity, kThreads), kThreads, 0, [&] {
      weigh(index, static_cast<T*>(won), static_cast<T*>(total), static_cast<T*>(weight), rows * capacity,
            static_cast<int64_t>(experts) * capacity, tokens, route_scale);
    });
  });
}

extern "C" void expert_choice_backward(int type, const void* grad, const void* logits, const int64_t* index,
                                       const void* cut, const void* total, float* spread_grad, void* grad_logits,
                                       int64_t images, int tokens, int experts, int capacity, bool use_sigmoid,
                                       float route_scale) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tiles = parts(tokens, kTileTokens), picks = images * experts * capacity;
    launch(parts(picks, kThreads), kThreads, 0,
           [&] { spread(index, static_cast<const T*>(grad), spread_grad, picks, capacity, tokens); });
    launch(images * tiles, kThreads, experts * (kTileTokens + 1) * sizeof(float), [&] {
      backward(static_cast<const T*>(logits), spread_grad, static_cast<const Cut*>(cut), static_cast<const T*>(total),
               static_cast<T*>(grad_logits), tokens, experts, tiles, use_sigmoid, route_scale);
    });
  });
}

static TensorTable table_of(void** data, const int64_t* elements, int count) {
  TensorTable table;
  table.count = count;
  table.first[0] = 0;
  for (int i = 0; i < count; ++i) {
    table.data[i] = data[i];
    table.elements[i] = elements[i];
    table.first[i + 1] = table.first[i] + static_cast<int32_t>(parts(elements[i], kChunkElements));
  }
  return table;
}

extern "C" int max_tensors() { return kMaxTensors; }

extern "C" void square_sum(int type, void** data, const int64_t* elements, int count, double* partial, double* out) {
  const TensorTable table = table_of(data, elements, count);
  with_type(type, [&](auto zero) {
    launch(table.first[count], kThreads, 0, [&] { square_sums<decltype(zero)>(table, partial); });
  });
  launch(1, kThreads, 0, [&] { add_up(partial, table.first[count], out); });
}

extern "C" void scale_tensors(int type, void** data, const int64_t* elements, int count, const float* factor) {
  const TensorTable table = table_of(data, elements, count);
  with_type(type, [&](auto zero) {
    launch(table.first[count], kThreads, 0, [&] { scale<decltype(zero)>(table, factor); });
  });
}
