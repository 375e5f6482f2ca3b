// Weighted scatter-add of expert rows onto their tokens, and its gradients.
//
// Threads own disjoint token ranges and every thread walks the rows in order, so a token's sum has one order and the
// result is the same bits for any number of threads. Reading the whole index on each thread costs N/T of a row copy.
#include "common.h"

namespace mn {
namespace {

// out[t] = base[t] + sum of weight[n] * rows[n] over index[n] == t, for tokens begin <= t < end.
// sums holds those tokens' wide sums; where T is wide already it is the output itself.
template <typename T>
MN_INLINE void add_rows(const T* __restrict base, const T* __restrict rows, const T* __restrict weight,
                        const int64_t* __restrict index, T* __restrict out, Wide<T>* __restrict sums, int64_t N,
                        int64_t D, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < (end - begin) * D; ++i) sums[i] = static_cast<Wide<T>>(base[begin * D + i]);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t token = index[n];
    if (token < begin || token >= end) continue;
    const Wide<T> w = static_cast<Wide<T>>(weight[n]);
    Wide<T>* __restrict sum = sums + (token - begin) * D;
    const T* __restrict row = rows + n * D;
    for (int64_t d = 0; d < D; ++d) sum[d] += w * static_cast<Wide<T>>(row[d]);
  }
  if constexpr (!std::is_same_v<T, Wide<T>>) {
    for (int64_t i = 0; i < (end - begin) * D; ++i) out[begin * D + i] = static_cast<T>(sums[i]);
  }
}

template <typename T>
MN_INLINE void row_gradients(const T* __restrict grad, const T* __restrict rows, const T* __restrict weight,
                             const int64_t* __restrict index, T* __restrict grad_rows, T* __restrict grad_weight,
                             int64_t D, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* __restrict g = grad + index[n] * D;
    const T* __restrict row = rows + n * D;
    T* __restrict out = grad_rows + n * D;
    const Wide<T> w = static_cast<Wide<T>>(weight[n]);
    Wide<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; ++d) {
      const Wide<T> gd = static_cast<Wide<T>>(g[d]);
      out[d] = static_cast<T>(w * gd);
      dot += gd * static_cast<Wide<T>>(row[d]);
    }
    grad_weight[n] = static_cast<T>(dot);
  }
}

#define MN_ROWS(T)                                                                                                    \
  MN_VECTORISED void add_rows_of(const T* base, const T* rows, const T* weight, const int64_t* index, T* out,         \
                                 Wide<T>* sums, int64_t N, int64_t D, int64_t begin, int64_t end) {                   \
    add_rows<T>(base, rows, weight, index, out, sums, N, D, begin, end);                                              \
  }                                                                                                                   \
  MN_VECTORISED void row_gradients_of(const T* grad, const T* rows, const T* weight, const int64_t* index,            \
                                      T* grad_rows, T* grad_weight, int64_t D, int64_t begin, int64_t end) {          \
    row_gradients<T>(grad, rows, weight, index, grad_rows, grad_weight, D, begin, end);                               \
  }
MN_ROWS(float)
MN_ROWS(double)
MN_ROWS(torch::headeronly::BFloat16)
MN_ROWS(torch::headeronly::Half)

void check_index(const Tensor& index, int64_t tokens) {
  check(index, "index", 1);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "index must be int64");
  const int64_t* position = index.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < index.size(0); ++n) {
    STD_TORCH_CHECK(position[n] >= 0 && position[n] < tokens, "index ", position[n], " is outside [0, ", tokens, ")");
  }
}

void check_rows(const Tensor& tokens, const Tensor& rows, const Tensor& weight, const Tensor& index) {
  check(tokens, "tokens", 2);
  check(rows, "rows", 2);
  check(weight, "weight", 1);
  check_index(index, tokens.size(0));
  STD_TORCH_CHECK(rows.scalar_type() == tokens.scalar_type() && weight.scalar_type() == tokens.scalar_type(),
                  "tokens, rows and weight must have one dtype");
  STD_TORCH_CHECK(rows.size(1) == tokens.size(1), "rows and tokens differ in width");
  STD_TORCH_CHECK(rows.size(0) == index.size(0) && weight.size(0) == index.size(0),
                  "rows, weight and index differ in length");
}

}  // namespace

Tensor combine_rows(Tensor base, Tensor rows, Tensor weight, Tensor index) {
  check_rows(base, rows, weight, index);
  Tensor out = empty_like(base);
  const int64_t T = base.size(0), D = base.size(1), N = rows.size(0);
  const int64_t work_per_token = D + (T > 0 ? N * D / T : 0);
  dispatch(base.scalar_type(), "combine_rows", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* base_p = static_cast<const Scalar*>(base.const_data_ptr());
    const auto* rows_p = static_cast<const Scalar*>(rows.const_data_ptr());
    const auto* weight_p = static_cast<const Scalar*>(weight.const_data_ptr());
    const auto* index_p = index.const_data_ptr<int64_t>();
    auto* out_p = static_cast<Scalar*>(out.mutable_data_ptr());
    parallel_for(0, T, grain(work_per_token), [&](int64_t begin, int64_t end) {
      if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
        add_rows_of(base_p, rows_p, weight_p, index_p, out_p, out_p + begin * D, N, D, begin, end);
      } else {
        std::vector<Wide<Scalar>> sums((end - begin) * D);
        add_rows_of(base_p, rows_p, weight_p, index_p, out_p, sums.data(), N, D, begin, end);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_rows_backward(Tensor grad, Tensor rows, Tensor weight, Tensor index) {
  check_rows(grad, rows, weight, index);
  Tensor grad_rows = empty_like(rows), grad_weight = empty_like(weight);
  const int64_t D = grad.size(1), N = rows.size(0);
  dispatch(grad.scalar_type(), "combine_rows_backward", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* grad_p = static_cast<const Scalar*>(grad.const_data_ptr());
    const auto* rows_p = static_cast<const Scalar*>(rows.const_data_ptr());
    const auto* weight_p = static_cast<const Scalar*>(weight.const_data_ptr());
    const auto* index_p = index.const_data_ptr<int64_t>();
    auto* grad_rows_p = static_cast<Scalar*>(grad_rows.mutable_data_ptr());
    auto* grad_weight_p = static_cast<Scalar*>(grad_weight.mutable_data_ptr());
    parallel_for(0, N, grain(2 * D), [&](int64_t begin, int64_t end) {
      row_gradients_of(grad_p, rows_p, weight_p, index_p, grad_rows_p, grad_weight_p, D, begin, end);
    });
  });
  return {grad_rows, grad_weight};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) {
  m.def("combine_rows(Tensor base, Tensor rows, Tensor weight, Tensor index) -> Tensor");
  m.def("combine_rows_backward(Tensor grad, Tensor rows, Tensor weight, Tensor index) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CPU, m) {
  m.impl("combine_rows", TORCH_BOX(&combine_rows));
  m.impl("combine_rows_backward", TORCH_BOX(&combine_rows_backward));
}

}  // namespace mn
