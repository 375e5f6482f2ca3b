// torch.ops.megatron_nucleus.expert_choice and its gradient (expert_choice.cuh).
#include "binding.cuh"
#include "expert_choice.cuh"

namespace mn::cuda {
namespace {

// Winners of a row that are sorted in shared memory: 32 KB, within what every GPU grants without asking. More of them
// are sorted in global memory.
constexpr int kSharedItems = 4096;

struct Sizes {
  int64_t images, tokens, experts, tiles;
  size_t tile_bytes;
};

Sizes sizes_of(const Tensor& logits) {
  check(logits, "logits", 3);
  const int64_t tokens = logits.size(1), experts = logits.size(2);
  STD_TORCH_CHECK(experts >= 1 && experts <= kMaxExperts, "expert_choice takes up to ", kMaxExperts, " experts, got ",
                  experts);
  STD_TORCH_CHECK(tokens < 0x7FFFFFFF, "expert_choice takes fewer than 2^31 tokens of an image");
  return {logits.size(0), tokens, experts, (tokens + kTileTokens - 1) / kTileTokens,
          static_cast<size_t>(experts) * (kTileTokens + 1) * sizeof(float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_choice(Tensor logits, int64_t capacity, bool use_sigmoid,
                                                         double route_scale) {
  const Sizes n = sizes_of(logits);
  STD_TORCH_CHECK(capacity >= 1 && capacity <= n.tokens, "expert_choice: capacity must be in [1, ", n.tokens, "], got ",
                  capacity);
  const DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = stream_of(logits);
  Tensor index = torch::stable::new_empty(logits, {n.images, n.experts, capacity}, ScalarType::Long);
  Tensor weight = torch::stable::new_empty(logits, {n.images, n.experts, capacity});
  Tensor cut = torch::stable::new_empty(logits, {n.images, n.experts, 2}, ScalarType::Int);
  Tensor total = torch::stable::new_empty(logits, {n.images, n.tokens});
  if (n.images == 0) return {index, weight, cut, total};

  const int64_t rows = n.images * n.experts;
  int64_t sorted = 1;
  while (sorted < capacity) sorted *= 2;
  const bool shared = sorted <= kSharedItems;
  Tensor score = torch::stable::new_empty(logits, {n.images, n.experts, n.tokens});
  Tensor won = torch::stable::new_empty(logits, {n.images, n.experts, capacity});
  Tensor scratch = torch::stable::new_empty(logits, {shared ? 0 : rows, sorted}, ScalarType::Long);
  dispatch(logits.scalar_type(), "expert_choice", [&](auto zero) {
    using T = decltype(zero);
    Cut* cuts = reinterpret_cast<Cut*>(pointer<int32_t>(cut));
    scores<T><<<blocks(n.images * n.tiles, 1), kThreads, n.tile_bytes, stream>>>(
        pointer<T>(logits), pointer<T>(score), n.tokens, n.experts, n.tiles, use_sigmoid);
    choose<T><<<blocks(rows, 1), kThreads, shared ? sorted * sizeof(uint64_t) : 0, stream>>>(
        pointer<T>(score), pointer<int64_t>(index), pointer<T>(won), cuts,
        shared ? nullptr : reinterpret_cast<uint64_t*>(pointer<int64_t>(scratch)), n.tokens, capacity, sorted);
    totals<T><<<blocks(n.images * n.tokens, kThreads), kThreads, 0, stream>>>(pointer<T>(score), cuts, pointer<T>(total),
                                                                             n.images, n.tokens, n.experts);
    weigh<T><<<blocks(rows * capacity, kThreads), kThreads, 0, stream>>>(
        pointer<int64_t>(index), pointer<T>(won), pointer<T>(total), pointer<T>(weight), rows * capacity,
        n.experts * capacity, n.tokens, static_cast<float>(route_scale));
  });
  check_launch("expert_choice");
  return {index, weight, cut, total};
}

Tensor expert_choice_backward(Tensor grad, Tensor logits, Tensor index, Tensor cut, Tensor total, bool use_sigmoid,
                              double route_scale) {
  const Sizes n = sizes_of(logits);
  check(grad, "grad", 3);
  STD_TORCH_CHECK(grad.scalar_type() == logits.scalar_type(), "grad and logits must have one dtype");
  const DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = stream_of(logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {n.images, n.tokens, n.experts});
  if (n.images == 0) return grad_logits;
  const int64_t capacity = index.size(2), picks = n.images * n.experts * capacity;
  Tensor spread_grad = torch::stable::new_zeros(logits, {n.images, n.experts, n.tokens}, ScalarType::Float);
  dispatch(logits.scalar_type(), "expert_choice_backward", [&](auto zero) {
    using T = decltype(zero);
    spread<T><<<blocks(picks, kThreads), kThreads, 0, stream>>>(pointer<int64_t>(index), pointer<T>(grad),
                                                               pointer<float>(spread_grad), picks, capacity, n.tokens);
    backward<T><<<blocks(n.images * n.tiles, 1), kThreads, n.tile_bytes, stream>>>(
        pointer<T>(logits), pointer<float>(spread_grad), reinterpret_cast<const Cut*>(pointer<int32_t>(cut)),
        pointer<T>(total), pointer<T>(grad_logits), n.tokens, n.experts, n.tiles, use_sigmoid,
        static_cast<float>(route_scale));
  });
  check_launch("expert_choice_backward");
  return grad_logits;
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) {
  m.def("expert_choice(Tensor logits, int capacity, bool use_sigmoid, float route_scale) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("expert_choice_backward(Tensor grad, Tensor logits, Tensor index, Tensor cut, Tensor total, bool use_sigmoid, "
        "float route_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CUDA, m) {
  m.impl("expert_choice", TORCH_BOX(&expert_choice));
  m.impl("expert_choice_backward", TORCH_BOX(&expert_choice_backward));
}

}  // namespace
}  // namespace mn::cuda
