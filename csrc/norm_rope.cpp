// RMSNorm of every head followed by rotary positions, and the gradients: one pass where there were two.
//
// Rows are heads, [B, T, H, K] one behind the other, so row r stands at position r / H % T. The rotation of a pair of
// neighbouring channels is (cos, sin), [T, K/2, 2] in fp32. Sums over rows run over fixed chunks, as in norm.cpp.
#include "common.h"
#include "rows.h"

namespace mn {
namespace {

constexpr int64_t kRowsPerChunk = 512;

template <typename T>
MN_INLINE void forward_rows(const T* __restrict x, const T* __restrict weight, const float* __restrict rotation,
                            T* __restrict out, Wide<T> eps, int64_t positions, int64_t H, int64_t K, int64_t begin,
                            int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict xr = x + row * K;
    const float* __restrict turn = rotation + row / H % positions * K;
    T* __restrict yr = out + row * K;
    const Wide<T> scale = inverse_rms<T>(xr, K, eps);
#pragma omp simd
    for (int64_t k = 0; k < K; k += 2) {
      // Rounded to T between the two operations, as the reference is.
      const Wide<T> even = static_cast<Wide<T>>(
          static_cast<T>(static_cast<Wide<T>>(xr[k]) * scale * static_cast<Wide<T>>(weight[k])));
      const Wide<T> odd = static_cast<Wide<T>>(
          static_cast<T>(static_cast<Wide<T>>(xr[k + 1]) * scale * static_cast<Wide<T>>(weight[k + 1])));
      const Wide<T> c = turn[k], s = turn[k + 1];
      yr[k] = static_cast<T>(even * c - odd * s);
      yr[k + 1] = static_cast<T>(even * s + odd * c);
    }
  }
}

// One chunk of rows; grad_weight is its partial sum [K]; scratch holds one row's gradient before the rotation.
template <typename T>
MN_INLINE void backward_chunk(const T* __restrict grad, const T* __restrict x, const T* __restrict weight,
                              const float* __restrict rotation, T* __restrict grad_x, Wide<T>* __restrict grad_weight,
                              Wide<T>* __restrict scratch, Wide<T> eps, int64_t positions, int64_t H, int64_t K,
                              int64_t begin, int64_t end) {
  for (int64_t k = 0; k < K; ++k) grad_weight[k] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict xr = x + row * K;
    const T* __restrict gr = grad + row * K;
    const float* __restrict turn = rotation + row / H % positions * K;
    T* __restrict out = grad_x + row * K;
    const Wide<T> scale = inverse_rms<T>(xr, K, eps);
#pragma omp simd
    for (int64_t k = 0; k < K; k += 2) {
      const Wide<T> even = static_cast<Wide<T>>(gr[k]), odd = static_cast<Wide<T>>(gr[k + 1]);
      const Wide<T> c = turn[k], s = turn[k + 1];
      scratch[k] = even * c + odd * s;
      scratch[k + 1] = odd * c - even * s;
    }
    Wide<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t k = 0; k < K; ++k) {
      const Wide<T> product = scratch[k] * static_cast<Wide<T>>(xr[k]);
      grad_weight[k] += product * scale;
      dot += product * static_cast<Wide<T>>(weight[k]);
    }
    const Wide<T> pull = dot / K * scale * scale;
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) {
      out[k] = static_cast<T>(
          scale * (scratch[k] * static_cast<Wide<T>>(weight[k]) - static_cast<Wide<T>>(xr[k]) * pull));
    }
  }
}

#define MN_NORM_ROPE(T)                                                                                               \
  MN_VECTORISED void forward_of(const T* x, const T* weight, const float* rotation, T* out, Wide<T> eps,              \
                                int64_t positions, int64_t H, int64_t K, int64_t begin, int64_t end) {                \
    forward_rows<T>(x, weight, rotation, out, eps, positions, H, K, begin, end);                                      \
  }                                                                                                                   \
  MN_VECTORISED void backward_of(const T* grad, const T* x, const T* weight, const float* rotation, T* grad_x,        \
                                 Wide<T>* grad_weight, Wide<T>* scratch, Wide<T> eps, int64_t positions, int64_t H,   \
                                 int64_t K, int64_t begin, int64_t end) {                                             \
    backward_chunk<T>(grad, x, weight, rotation, grad_x, grad_weight, scratch, eps, positions, H, K, begin, end);     \
  }
MN_NORM_ROPE(float)
MN_NORM_ROPE(double)
MN_NORM_ROPE(torch::headeronly::BFloat16)
MN_NORM_ROPE(torch::headeronly::Half)

void check_heads(const Tensor& x, const Tensor& weight, const Tensor& rotation) {
  check(x, "x", 4);
  check(weight, "weight", 1);
  check(rotation, "rotation", 3);
  const int64_t K = x.size(3);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "x and weight must have one dtype");
  STD_TORCH_CHECK(rotation.scalar_type() == ScalarType::Float, "rotation must be float32");
  STD_TORCH_CHECK(weight.size(0) == K && K % 2 == 0, "weight must have the width of a head, an even one");
  STD_TORCH_CHECK(rotation.size(0) == x.size(1) && rotation.size(1) == K / 2 && rotation.size(2) == 2,
                  "rotation must be [T, K/2, 2] of x [B, T, H, K]");
}

}  // namespace

Tensor norm_rope(Tensor x, Tensor weight, Tensor rotation, double eps) {
  check_heads(x, weight, rotation);
  Tensor out = empty_like(x);
  const int64_t T = x.size(1), H = x.size(2), K = x.size(3), rows = x.size(0) * T * H;
  dispatch(x.scalar_type(), "norm_rope", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* x_p = static_cast<const Scalar*>(x.const_data_ptr());
    const auto* weight_p = static_cast<const Scalar*>(weight.const_data_ptr());
    const auto* rotation_p = rotation.const_data_ptr<float>();
    auto* out_p = static_cast<Scalar*>(out.mutable_data_ptr());
    parallel_for(0, rows, grain(2 * K), [&](int64_t begin, int64_t end) {
      forward_of(x_p, weight_p, rotation_p, out_p, static_cast<Wide<Scalar>>(eps), T, H, K, begin, end);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> norm_rope_backward(Tensor grad, Tensor x, Tensor weight, Tensor rotation, double eps) {
  check_heads(x, weight, rotation);
  check_like(grad, "grad", x);
  Tensor grad_x = empty_like(x), grad_weight = empty_like(weight);
  const int64_t T = x.size(1), H = x.size(2), K = x.size(3), rows = x.size(0) * T * H;
  const int64_t chunks = chunks_of(rows, kRowsPerChunk);
  dispatch(x.scalar_type(), "norm_rope_backward", [&](auto zero) {
    using Scalar = decltype(zero);
    using Sum = Wide<Scalar>;
    const auto* grad_p = static_cast<const Scalar*>(grad.const_data_ptr());
    const auto* x_p = static_cast<const Scalar*>(x.const_data_ptr());
    const auto* weight_p = static_cast<const Scalar*>(weight.const_data_ptr());
    const auto* rotation_p = rotation.const_data_ptr<float>();
    auto* grad_x_p = static_cast<Scalar*>(grad_x.mutable_data_ptr());
    auto* grad_weight_p = static_cast<Scalar*>(grad_weight.mutable_data_ptr());
    std::vector<Sum> partial(chunks * K);
    parallel_for(0, chunks, grain(4 * K * kRowsPerChunk), [&](int64_t begin, int64_t end) {
      std::vector<Sum> scratch(K);
      for (int64_t c = begin; c < end; ++c) {
        backward_of(grad_p, x_p, weight_p, rotation_p, grad_x_p, partial.data() + c * K, scratch.data(),
                    static_cast<Sum>(eps), T, H, K, c * kRowsPerChunk, std::min((c + 1) * kRowsPerChunk, rows));
      }
    });
    for (int64_t k = 0; k < K; ++k) {
      Sum sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[c * K + k];
      grad_weight_p[k] = static_cast<Scalar>(sum);
    }
  });
  return {grad_x, grad_weight};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) {
  m.def("norm_rope(Tensor x, Tensor weight, Tensor rotation, float eps) -> Tensor");
  m.def("norm_rope_backward(Tensor grad, Tensor x, Tensor weight, Tensor rotation, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CPU, m) {
  m.impl("norm_rope", TORCH_BOX(&norm_rope));
  m.impl("norm_rope_backward", TORCH_BOX(&norm_rope_backward));
}

}  // namespace mn
