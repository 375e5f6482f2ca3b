// torch.ops.megatron_nucleus.square_sum on a GPU, and scale_tensors_ (grad_norm.cuh).
#include "binding.cuh"
#include "grad_norm.cuh"

namespace mn::cuda {
namespace {

// Calls launch(table, chunks) for as many tensors of one dtype as fit a launch, in their order.
template <typename Launch>
void in_tables(const std::vector<Tensor>& tensors, ScalarType dtype, const Launch& launch) {
  TensorTable table;
  table.count = 0;
  table.first[0] = 0;
  const auto flush = [&] {
    if (table.count != 0) launch(table, table.first[table.count]);
    table.count = 0;
  };
  for (const Tensor& tensor : tensors) {
    if (tensor.scalar_type() != dtype || tensor.numel() == 0) continue;
    const int64_t chunks = (tensor.numel() + kChunkElements - 1) / kChunkElements;
    STD_TORCH_CHECK(chunks < 0x3FFFFFFF, "a tensor of ", tensor.numel(), " elements is too large");
    if (table.count == kMaxTensors || table.first[table.count] + chunks > 0x7FFFFFFF) flush();
    table.data[table.count] = tensor.mutable_data_ptr();
    table.elements[table.count] = tensor.numel();
    table.first[table.count + 1] = table.first[table.count] + static_cast<int32_t>(chunks);
    ++table.count;
  }
  flush();
}

void check_list(const std::vector<Tensor>& tensors, const char* op) {
  STD_TORCH_CHECK(!tensors.empty(), op, " needs a tensor");
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), op, " takes contiguous tensors on a GPU");
    STD_TORCH_CHECK(tensor.get_device_index() == tensors[0].get_device_index(), op, " takes tensors of one GPU");
    dispatch(tensor.scalar_type(), op, [](auto) {});
  }
}

constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

Tensor square_sum(std::vector<Tensor> tensors) {
  check_list(tensors, "square_sum");
  const DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = stream_of(tensors[0]);
  int64_t chunks = 0;
  for (const Tensor& tensor : tensors) chunks += (tensor.numel() + kChunkElements - 1) / kChunkElements;
  Tensor partial = torch::stable::new_empty(tensors[0], {chunks}, ScalarType::Double);
  Tensor out = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  double* next = pointer<double>(partial);
  for (const ScalarType dtype : kDtypes) {
    dispatch(dtype, "square_sum", [&](auto zero) {
      in_tables(tensors, dtype, [&](const TensorTable& table, int32_t count) {
        square_sums<decltype(zero)><<<count, kThreads, 0, stream>>>(table, next);
        next += count;
      });
    });
  }
  add_up<<<1, kThreads, 0, stream>>>(pointer<double>(partial), chunks, pointer<double>(out));
  check_launch("square_sum");
  return out;
}

void scale_tensors_(std::vector<Tensor> tensors, Tensor factor) {
  check_list(tensors, "scale_tensors_");
  check(factor, "factor", 0);
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float, "factor must be float32");
  const DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = stream_of(tensors[0]);
  for (const ScalarType dtype : kDtypes) {
    dispatch(dtype, "scale_tensors_", [&](auto zero) {
      in_tables(tensors, dtype, [&](const TensorTable& table, int32_t count) {
        scale<decltype(zero)><<<count, kThreads, 0, stream>>>(table, pointer<float>(factor));
      });
    });
  }
  check_launch("scale_tensors_");
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) {
  m.def("scale_tensors_(Tensor(a!)[] tensors, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CUDA, m) {
  m.impl("square_sum", TORCH_BOX(&square_sum));
  m.impl("scale_tensors_", TORCH_BOX(&scale_tensors_));
}

}  // namespace
}  // namespace mn::cuda
