// y = x + gate * branch and the modulated LayerNorm of y, with gradients: a row is read once and written once.
//
// Sums over tokens (the gradients of gate and scale) run over fixed chunks, as in norm.cpp.
#include "common.h"
#include "rows.h"

namespace mn {
namespace {

template <typename T>
MN_INLINE void forward_rows(const T* __restrict x, const T* __restrict branch, const T* __restrict gate,
                            const T* __restrict scale, T* __restrict y, T* __restrict modulated, T* __restrict plain,
                            Wide<T> eps, int64_t S, int64_t D, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict xr = x + row * D;
    const T* __restrict br = branch + row * D;
    const T* __restrict gr = gate + row / S * D;
    const T* __restrict sr = scale + row / S * D;
    T* __restrict yr = y + row * D;
    T* __restrict mr = modulated + row * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      yr[d] = static_cast<T>(static_cast<Wide<T>>(xr[d]) + static_cast<Wide<T>>(gr[d]) * static_cast<Wide<T>>(br[d]));
    }
    const auto [mean, inverse_std] = moments<T>(yr, D, eps);
    if (plain == nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const Wide<T> normal = (static_cast<Wide<T>>(yr[d]) - mean) * inverse_std;
        mr[d] = static_cast<T>(normal * (Wide<T>(1) + static_cast<Wide<T>>(sr[d])));
      }
    } else {
      T* __restrict pr = plain + row * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const Wide<T> normal = (static_cast<Wide<T>>(yr[d]) - mean) * inverse_std;
        pr[d] = static_cast<T>(normal);
        mr[d] = static_cast<T>(normal * (Wide<T>(1) + static_cast<Wide<T>>(sr[d])));
      }
    }
  }
}

// One chunk of at most kTokensPerChunk tokens of one image; sums holds its partial gradients of gate [D] and scale [D].
template <bool kPlain, typename T>
MN_INLINE void backward_chunk(const T* __restrict grad_y, const T* __restrict grad, const T* __restrict grad_plain,
                              const T* __restrict y, const T* __restrict branch, const T* __restrict gate,
                              const T* __restrict scale, T* __restrict grad_x, T* __restrict grad_branch,
                              Wide<T>* __restrict sums, Wide<T>* __restrict scratch, Wide<T> eps, int64_t D,
                              int64_t tokens) {
  Wide<T>* __restrict normal = scratch;
  Wide<T>* __restrict inner = scratch + D;
  Wide<T>* __restrict grad_gate = sums;
  Wide<T>* __restrict grad_scale = sums + D;
  for (int64_t d = 0; d < 2 * D; ++d) sums[d] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = t * D;
    const auto [mean, inverse_std] = moments<T>(y + at, D, eps);
    Wide<T> sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t d = 0; d < D; ++d) {
      const Wide<T> g = static_cast<Wide<T>>(grad[at + d]);
      normal[d] = (static_cast<Wide<T>>(y[at + d]) - mean) * inverse_std;
      grad_scale[d] += g * normal[d];
      inner[d] = g * (Wide<T>(1) + static_cast<Wide<T>>(scale[d]));
      if constexpr (kPlain) inner[d] += static_cast<Wide<T>>(grad_plain[at + d]);
      sum += inner[d];
      dot += inner[d] * normal[d];
    }
    const Wide<T> mean_inner = sum / D, mean_dot = dot / D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const Wide<T> total =
          static_cast<Wide<T>>(grad_y[at + d]) + inverse_std * (inner[d] - mean_inner - normal[d] * mean_dot);
      grad_x[at + d] = static_cast<T>(total);
      grad_branch[at + d] = static_cast<T>(total * static_cast<Wide<T>>(gate[d]));
      grad_gate[d] += total * static_cast<Wide<T>>(branch[at + d]);
    }
  }
}

#define MN_GATED(T)                                                                                                   \
  MN_VECTORISED void forward_of(const T* x, const T* branch, const T* gate, const T* scale, T* y, T* modulated,       \
                                T* plain, Wide<T> eps, int64_t S, int64_t D, int64_t begin, int64_t end) {            \
    forward_rows<T>(x, branch, gate, scale, y, modulated, plain, eps, S, D, begin, end);                              \
  }                                                                                                                   \
  MN_VECTORISED void backward_of(const T* grad_y, const T* grad, const T* grad_plain, const T* y, const T* branch,    \
                                 const T* gate, const T* scale, T* grad_x, T* grad_branch, Wide<T>* sums,             \
                                 Wide<T>* scratch, Wide<T> eps, int64_t D, int64_t tokens) {                          \
    if (grad_plain != nullptr) {                                                                                      \
      backward_chunk<true, T>(grad_y, grad, grad_plain, y, branch, gate, scale, grad_x, grad_branch, sums, scratch,   \
                              eps, D, tokens);                                                                        \
    } else {                                                                                                          \
      backward_chunk<false, T>(grad_y, grad, grad_plain, y, branch, gate, scale, grad_x, grad_branch, sums, scratch,  \
                               eps, D, tokens);                                                                       \
    }                                                                                                                 \
  }
MN_GATED(float)
MN_GATED(double)
MN_GATED(torch::headeronly::BFloat16)
MN_GATED(torch::headeronly::Half)

void check_gated(const Tensor& x, const Tensor& branch, const Tensor& gate, const Tensor& scale) {
  check(x, "x", 3);
  check_like(branch, "branch", x);
  check(gate, "gate", 2);
  check_like(scale, "scale", gate);
  STD_TORCH_CHECK(gate.scalar_type() == x.scalar_type(), "x and gate must have one dtype");
  STD_TORCH_CHECK(gate.size(0) == x.size(0) && gate.size(1) == x.size(2), "gate must be [B, D] of x [B, S, D]");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm(Tensor x, Tensor branch, Tensor gate, Tensor scale, double eps,
                                                       bool with_plain) {
  check_gated(x, branch, gate, scale);
  const int64_t B = x.size(0), S = x.size(1), D = x.size(2);
  Tensor y = empty_like(x), modulated = empty_like(x);
  Tensor plain = with_plain ? empty_like(x) : torch::stable::new_empty(x, {0});
  dispatch(x.scalar_type(), "gated_residual_norm", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* x_p = static_cast<const Scalar*>(x.const_data_ptr());
    const auto* branch_p = static_cast<const Scalar*>(branch.const_data_ptr());
    const auto* gate_p = static_cast<const Scalar*>(gate.const_data_ptr());
    const auto* scale_p = static_cast<const Scalar*>(scale.const_data_ptr());
    auto* y_p = static_cast<Scalar*>(y.mutable_data_ptr());
    auto* modulated_p = static_cast<Scalar*>(modulated.mutable_data_ptr());
    auto* plain_p = with_plain ? static_cast<Scalar*>(plain.mutable_data_ptr()) : nullptr;
    parallel_for(0, B * S, grain(2 * D), [&](int64_t begin, int64_t end) {
      forward_of(x_p, branch_p, gate_p, scale_p, y_p, modulated_p, plain_p, static_cast<Wide<Scalar>>(eps), S, D,
                 begin, end);
    });
  });
  return {y, modulated, plain};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward(Tensor grad_y, Tensor grad,
                                                                        std::optional<Tensor> grad_plain, Tensor y,
                                                                        Tensor branch, Tensor gate, Tensor scale,
                                                                        double eps) {
  check_gated(y, branch, gate, scale);
  check_like(grad_y, "grad_y", y);
  check_like(grad, "grad", y);
  if (grad_plain.has_value()) check_like(*grad_plain, "grad_plain", y);
  const int64_t B = y.size(0), S = y.size(1), D = y.size(2), chunks = chunks_of(S, kTokensPerChunk);
  Tensor grad_x = empty_like(y), grad_branch = empty_like(y), grad_gate = empty_like(gate), grad_scale = empty_like(gate);
  dispatch(y.scalar_type(), "gated_residual_norm_backward", [&](auto zero) {
    using Scalar = decltype(zero);
    using Sum = Wide<Scalar>;
    const auto* grad_y_p = static_cast<const Scalar*>(grad_y.const_data_ptr());
    const auto* grad_p = static_cast<const Scalar*>(grad.const_data_ptr());
    const auto* plain_p = grad_plain.has_value() ? static_cast<const Scalar*>(grad_plain->const_data_ptr()) : nullptr;
    const auto* y_p = static_cast<const Scalar*>(y.const_data_ptr());
    const auto* branch_p = static_cast<const Scalar*>(branch.const_data_ptr());
    const auto* gate_p = static_cast<const Scalar*>(gate.const_data_ptr());
    const auto* scale_p = static_cast<const Scalar*>(scale.const_data_ptr());
    auto* grad_x_p = static_cast<Scalar*>(grad_x.mutable_data_ptr());
    auto* grad_branch_p = static_cast<Scalar*>(grad_branch.mutable_data_ptr());
    auto* grad_gate_p = static_cast<Scalar*>(grad_gate.mutable_data_ptr());
    auto* grad_scale_p = static_cast<Scalar*>(grad_scale.mutable_data_ptr());
    std::vector<Sum> partial(B * chunks * 2 * D);
    parallel_for(0, B * chunks, grain(4 * D * std::min(S, kTokensPerChunk)), [&](int64_t begin, int64_t end) {
      std::vector<Sum> scratch(2 * D);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks, first = i % chunks * kTokensPerChunk, at = (b * S + first) * D;
        backward_of(grad_y_p + at, grad_p + at, plain_p == nullptr ? nullptr : plain_p + at, y_p + at, branch_p + at,
                    gate_p + b * D, scale_p + b * D, grad_x_p + at, grad_branch_p + at, partial.data() + i * 2 * D,
                    scratch.data(), static_cast<Sum>(eps), D, std::min(kTokensPerChunk, S - first));
      }
    });
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t d = 0; d < D; ++d) {
        Sum gate_sum = 0, scale_sum = 0;
        for (int64_t c = 0; c < chunks; ++c) {
          gate_sum += partial[(b * chunks + c) * 2 * D + d];
          scale_sum += partial[(b * chunks + c) * 2 * D + D + d];
        }
        grad_gate_p[b * D + d] = static_cast<Scalar>(gate_sum);
        grad_scale_p[b * D + d] = static_cast<Scalar>(scale_sum);
      }
    }
  });
  return {grad_x, grad_branch, grad_gate, grad_scale};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) {
  m.def("gated_residual_norm(Tensor x, Tensor branch, Tensor gate, Tensor scale, float eps, bool with_plain)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("gated_residual_norm_backward(Tensor grad_y, Tensor grad, Tensor? grad_plain, Tensor y, Tensor branch,"
        " Tensor gate, Tensor scale, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CPU, m) {
  m.impl("gated_residual_norm", TORCH_BOX(&gated_residual_norm));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&gated_residual_norm_backward));
}

}  // namespace mn
