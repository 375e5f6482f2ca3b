// Affine-free LayerNorm with adaptive scale, RMSNorm, and their gradients.
//
// Statistics are recomputed in the backward pass (a row lies in the first-level cache) instead of being stored.
// Sums over tokens run over fixed chunks of rows and then over the chunks in order: the same bits for any number of
// threads.
#include "common.h"
#include "rows.h"

namespace mn {
namespace {

constexpr int64_t kRowsPerChunk = 512;

template <typename T>
MN_INLINE void layer_norm_rows(const T* __restrict x, const T* __restrict scale, T* __restrict modulated,
                               T* __restrict plain, Wide<T> eps, int64_t S, int64_t D, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict xr = x + row * D;
    const T* __restrict sr = scale + row / S * D;
    T* __restrict mr = modulated + row * D;
    const auto [mean, inverse_std] = moments<T>(xr, D, eps);
    if (plain == nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const Wide<T> normal = (static_cast<Wide<T>>(xr[d]) - mean) * inverse_std;
        mr[d] = static_cast<T>(normal * (Wide<T>(1) + static_cast<Wide<T>>(sr[d])));
      }
    } else {
      T* __restrict pr = plain + row * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const Wide<T> normal = (static_cast<Wide<T>>(xr[d]) - mean) * inverse_std;
        pr[d] = static_cast<T>(normal);
        mr[d] = static_cast<T>(normal * (Wide<T>(1) + static_cast<Wide<T>>(sr[d])));
      }
    }
  }
}

// One chunk of at most kTokensPerChunk tokens of one image; grad_scale is that chunk's partial sum [D].
template <bool kPlain, typename T>
MN_INLINE void layer_norm_chunk(const T* __restrict grad, const T* __restrict grad_plain, const T* __restrict x,
                                const T* __restrict scale, T* __restrict grad_x, Wide<T>* __restrict grad_scale,
                                Wide<T>* __restrict scratch, Wide<T> eps, int64_t D, int64_t tokens) {
  Wide<T>* __restrict normal = scratch;
  Wide<T>* __restrict inner = scratch + D;
  for (int64_t d = 0; d < D; ++d) grad_scale[d] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* __restrict xr = x + t * D;
    const T* __restrict gr = grad + t * D;
    T* __restrict out = grad_x + t * D;
    const auto [mean, inverse_std] = moments<T>(xr, D, eps);
    Wide<T> sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t d = 0; d < D; ++d) {
      const Wide<T> g = static_cast<Wide<T>>(gr[d]);
      normal[d] = (static_cast<Wide<T>>(xr[d]) - mean) * inverse_std;
      grad_scale[d] += g * normal[d];
      inner[d] = g * (Wide<T>(1) + static_cast<Wide<T>>(scale[d]));
      if constexpr (kPlain) inner[d] += static_cast<Wide<T>>(grad_plain[t * D + d]);
      sum += inner[d];
      dot += inner[d] * normal[d];
    }
    const Wide<T> mean_inner = sum / D, mean_dot = dot / D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      out[d] = static_cast<T>(inverse_std * (inner[d] - mean_inner - normal[d] * mean_dot));
    }
  }
}

template <typename T>
MN_INLINE void rms_norm_rows(const T* __restrict x, const T* __restrict weight, T* __restrict out, Wide<T> eps,
                             int64_t D, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict xr = x + row * D;
    T* __restrict yr = out + row * D;
    const Wide<T> scale = inverse_rms<T>(xr, D, eps);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      yr[d] = static_cast<T>(static_cast<Wide<T>>(xr[d]) * scale * static_cast<Wide<T>>(weight[d]));
    }
  }
}

template <typename T>
MN_INLINE void rms_norm_chunk(const T* __restrict grad, const T* __restrict x, const T* __restrict weight,
                              T* __restrict grad_x, Wide<T>* __restrict grad_weight, Wide<T> eps, int64_t D,
                              int64_t rows) {
  for (int64_t d = 0; d < D; ++d) grad_weight[d] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict xr = x + row * D;
    const T* __restrict gr = grad + row * D;
    T* __restrict out = grad_x + row * D;
    const Wide<T> scale = inverse_rms<T>(xr, D, eps);
    Wide<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; ++d) {
      const Wide<T> product = static_cast<Wide<T>>(gr[d]) * static_cast<Wide<T>>(xr[d]);
      grad_weight[d] += product * scale;
      dot += product * static_cast<Wide<T>>(weight[d]);
    }
    const Wide<T> pull = dot / D * scale * scale;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      out[d] = static_cast<T>(scale * (static_cast<Wide<T>>(gr[d]) * static_cast<Wide<T>>(weight[d]) -
                                       static_cast<Wide<T>>(xr[d]) * pull));
    }
  }
}

#define MN_NORM(T)                                                                                                    \
  MN_VECTORISED void layer_norm_of(const T* x, const T* scale, T* modulated, T* plain, Wide<T> eps, int64_t S,        \
                                   int64_t D, int64_t begin, int64_t end) {                                           \
    layer_norm_rows<T>(x, scale, modulated, plain, eps, S, D, begin, end);                                            \
  }                                                                                                                   \
  MN_VECTORISED void layer_norm_chunk_of(const T* grad, const T* grad_plain, const T* x, const T* scale, T* grad_x,   \
                                         Wide<T>* grad_scale, Wide<T>* scratch, Wide<T> eps, int64_t D,               \
                                         int64_t tokens) {                                                            \
    if (grad_plain != nullptr) {                                                                                      \
      layer_norm_chunk<true, T>(grad, grad_plain, x, scale, grad_x, grad_scale, scratch, eps, D, tokens);             \
    } else {                                                                                                          \
      layer_norm_chunk<false, T>(grad, grad_plain, x, scale, grad_x, grad_scale, scratch, eps, D, tokens);            \
    }                                                                                                                 \
  }                                                                                                                   \
  MN_VECTORISED void rms_norm_of(const T* x, const T* weight, T* out, Wide<T> eps, int64_t D, int64_t begin,          \
                                 int64_t end) {                                                                       \
    rms_norm_rows<T>(x, weight, out, eps, D, begin, end);                                                             \
  }                                                                                                                   \
  MN_VECTORISED void rms_norm_chunk_of(const T* grad, const T* x, const T* weight, T* grad_x, Wide<T>* grad_weight,   \
                                       Wide<T> eps, int64_t D, int64_t rows) {                                        \
    rms_norm_chunk<T>(grad, x, weight, grad_x, grad_weight, eps, D, rows);                                            \
  }
MN_NORM(float)
MN_NORM(double)
MN_NORM(torch::headeronly::BFloat16)
MN_NORM(torch::headeronly::Half)

void check_modulated(const Tensor& x, const Tensor& scale) {
  check(x, "x", 3);
  check(scale, "scale", 2);
  STD_TORCH_CHECK(scale.scalar_type() == x.scalar_type(), "x and scale must have one dtype");
  STD_TORCH_CHECK(scale.size(0) == x.size(0) && scale.size(1) == x.size(2), "scale must be [B, D] of x [B, S, D]");
}

}  // namespace

std::tuple<Tensor, Tensor> modulated_layer_norm(Tensor x, Tensor scale, double eps, bool with_plain) {
  check_modulated(x, scale);
  const int64_t B = x.size(0), S = x.size(1), D = x.size(2);
  Tensor modulated = empty_like(x);
  Tensor plain = with_plain ? empty_like(x) : torch::stable::new_empty(x, {0});
  dispatch(x.scalar_type(), "modulated_layer_norm", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* x_p = static_cast<const Scalar*>(x.const_data_ptr());
    const auto* scale_p = static_cast<const Scalar*>(scale.const_data_ptr());
    auto* modulated_p = static_cast<Scalar*>(modulated.mutable_data_ptr());
    auto* plain_p = with_plain ? static_cast<Scalar*>(plain.mutable_data_ptr()) : nullptr;
    parallel_for(0, B * S, grain(D), [&](int64_t begin, int64_t end) {
      layer_norm_of(x_p, scale_p, modulated_p, plain_p, static_cast<Wide<Scalar>>(eps), S, D, begin, end);
    });
  });
  return {modulated, plain};
}

std::tuple<Tensor, Tensor> modulated_layer_norm_backward(Tensor grad, std::optional<Tensor> grad_plain, Tensor x,
                                                         Tensor scale, double eps) {
  check_modulated(x, scale);
  check_like(grad, "grad", x);
  if (grad_plain.has_value()) check_like(*grad_plain, "grad_plain", x);
  const int64_t B = x.size(0), S = x.size(1), D = x.size(2), chunks = chunks_of(S, kTokensPerChunk);
  Tensor grad_x = empty_like(x), grad_scale = empty_like(scale);
  dispatch(x.scalar_type(), "modulated_layer_norm_backward", [&](auto zero) {
    using Scalar = decltype(zero);
    using Sum = Wide<Scalar>;
    const auto* grad_p = static_cast<const Scalar*>(grad.const_data_ptr());
    const auto* plain_p = grad_plain.has_value() ? static_cast<const Scalar*>(grad_plain->const_data_ptr()) : nullptr;
    const auto* x_p = static_cast<const Scalar*>(x.const_data_ptr());
    const auto* scale_p = static_cast<const Scalar*>(scale.const_data_ptr());
    auto* grad_x_p = static_cast<Scalar*>(grad_x.mutable_data_ptr());
    auto* grad_scale_p = static_cast<Scalar*>(grad_scale.mutable_data_ptr());
    std::vector<Sum> partial(B * chunks * D);
    parallel_for(0, B * chunks, grain(2 * D * std::min(S, kTokensPerChunk)), [&](int64_t begin, int64_t end) {
      std::vector<Sum> scratch(2 * D);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks, first = i % chunks * kTokensPerChunk, at = (b * S + first) * D;
        layer_norm_chunk_of(grad_p + at, plain_p == nullptr ? nullptr : plain_p + at, x_p + at, scale_p + b * D,
                            grad_x_p + at, partial.data() + i * D, scratch.data(), static_cast<Sum>(eps), D,
                            std::min(kTokensPerChunk, S - first));
      }
    });
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t d = 0; d < D; ++d) {
        Sum sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += partial[(b * chunks + c) * D + d];
        grad_scale_p[b * D + d] = static_cast<Scalar>(sum);
      }
    }
  });
  return {grad_x, grad_scale};
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  check(x, "x", 2);
  check(weight, "weight", 1);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "x and weight must have one dtype");
  STD_TORCH_CHECK(weight.size(0) == x.size(1), "weight must have the width of x");
  Tensor out = empty_like(x);
  const int64_t rows = x.size(0), D = x.size(1);
  dispatch(x.scalar_type(), "rms_norm", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* x_p = static_cast<const Scalar*>(x.const_data_ptr());
    const auto* weight_p = static_cast<const Scalar*>(weight.const_data_ptr());
    auto* out_p = static_cast<Scalar*>(out.mutable_data_ptr());
    parallel_for(0, rows, grain(D), [&](int64_t begin, int64_t end) {
      rms_norm_of(x_p, weight_p, out_p, static_cast<Wide<Scalar>>(eps), D, begin, end);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, double eps) {
  check(x, "x", 2);
  check(weight, "weight", 1);
  check_like(grad, "grad", x);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.size(0) == x.size(1),
                  "weight must have the dtype and the width of x");
  Tensor grad_x = empty_like(x), grad_weight = empty_like(weight);
  const int64_t rows = x.size(0), D = x.size(1), chunks = chunks_of(rows, kRowsPerChunk);
  dispatch(x.scalar_type(), "rms_norm_backward", [&](auto zero) {
    using Scalar = decltype(zero);
    using Sum = Wide<Scalar>;
    const auto* grad_p = static_cast<const Scalar*>(grad.const_data_ptr());
    const auto* x_p = static_cast<const Scalar*>(x.const_data_ptr());
    const auto* weight_p = static_cast<const Scalar*>(weight.const_data_ptr());
    auto* grad_x_p = static_cast<Scalar*>(grad_x.mutable_data_ptr());
    auto* grad_weight_p = static_cast<Scalar*>(grad_weight.mutable_data_ptr());
    std::vector<Sum> partial(chunks * D);
    parallel_for(0, chunks, grain(2 * D * kRowsPerChunk), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t at = c * kRowsPerChunk * D;
        rms_norm_chunk_of(grad_p + at, x_p + at, weight_p, grad_x_p + at, partial.data() + c * D,
                          static_cast<Sum>(eps), D, std::min(kRowsPerChunk, rows - c * kRowsPerChunk));
      }
    });
    for (int64_t d = 0; d < D; ++d) {
      Sum sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[c * D + d];
      grad_weight_p[d] = static_cast<Scalar>(sum);
    }
  });
  return {grad_x, grad_weight};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) {
  m.def("modulated_layer_norm(Tensor x, Tensor scale, float eps, bool with_plain) -> (Tensor, Tensor)");
  m.def("modulated_layer_norm_backward(Tensor grad, Tensor? grad_plain, Tensor x, Tensor scale, float eps)"
        " -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CPU, m) {
  m.impl("modulated_layer_norm", TORCH_BOX(&modulated_layer_norm));
  m.impl("modulated_layer_norm_backward", TORCH_BOX(&modulated_layer_norm_backward));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace mn
