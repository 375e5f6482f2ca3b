// silu(gate) * up over packed [gate, up] rows, and its gradient in one pass (no split, no concatenation).
#include <cmath>

#include "common.h"

namespace mn {
namespace {

// exp in fp32 that the compiler can vectorise: 2^n * polynomial(r) with |r| <= ln(2)/2 (Cephes expf coefficients),
// relative error below 2e-7. Arguments are limited to the range where fp32 neither overflows nor goes subnormal.
MN_INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  return p * __builtin_bit_cast(float, exponent);  // std::bit_cast would stay a call in the vectorised clones
}
MN_INLINE double fast_exp(double x) { return std::exp(x); }

template <typename T>
MN_INLINE void forward_rows(const T* __restrict gate_up, T* __restrict out, int64_t F, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict gate = gate_up + row * 2 * F;
    const T* __restrict up = gate + F;
    T* __restrict y = out + row * F;
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      const Wide<T> g = static_cast<Wide<T>>(gate[f]);
      y[f] = static_cast<T>(g / (Wide<T>(1) + fast_exp(-g)) * static_cast<Wide<T>>(up[f]));
    }
  }
}

template <typename T>
MN_INLINE void backward_rows(const T* __restrict grad, const T* __restrict gate_up, T* __restrict grad_gate_up,
                             int64_t F, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict gate = gate_up + row * 2 * F;
    const T* __restrict up = gate + F;
    const T* __restrict dy = grad + row * F;
    T* __restrict d_gate = grad_gate_up + row * 2 * F;
    T* __restrict d_up = d_gate + F;
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      const Wide<T> g = static_cast<Wide<T>>(gate[f]);
      const Wide<T> d = static_cast<Wide<T>>(dy[f]);
      const Wide<T> sigmoid = Wide<T>(1) / (Wide<T>(1) + fast_exp(-g));
      const Wide<T> silu = g * sigmoid;
      d_up[f] = static_cast<T>(d * silu);
      d_gate[f] = static_cast<T>(d * static_cast<Wide<T>>(up[f]) * (sigmoid + silu * (Wide<T>(1) - sigmoid)));
    }
  }
}

#define MN_SWIGLU(T)                                                                                                  \
  MN_VECTORISED void forward_of(const T* gate_up, T* out, int64_t F, int64_t begin, int64_t end) {                    \
    forward_rows<T>(gate_up, out, F, begin, end);                                                                     \
  }                                                                                                                   \
  MN_VECTORISED void backward_of(const T* grad, const T* gate_up, T* grad_gate_up, int64_t F, int64_t begin,          \
                                 int64_t end) {                                                                       \
    backward_rows<T>(grad, gate_up, grad_gate_up, F, begin, end);                                                     \
  }
MN_SWIGLU(float)
MN_SWIGLU(double)
MN_SWIGLU(torch::headeronly::BFloat16)
MN_SWIGLU(torch::headeronly::Half)

}  // namespace

Tensor swiglu(Tensor gate_up) {
  check(gate_up, "gate_up", 2);
  STD_TORCH_CHECK(gate_up.size(1) % 2 == 0, "gate_up must have an even width, has ", gate_up.size(1));
  const int64_t rows = gate_up.size(0), F = gate_up.size(1) / 2;
  Tensor out = torch::stable::new_empty(gate_up, {rows, F});
  dispatch(gate_up.scalar_type(), "swiglu", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* gate_up_p = static_cast<const Scalar*>(gate_up.const_data_ptr());
    auto* out_p = static_cast<Scalar*>(out.mutable_data_ptr());
    parallel_for(0, rows, grain(2 * F), [&](int64_t begin, int64_t end) { forward_of(gate_up_p, out_p, F, begin, end); });
  });
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor gate_up) {
  check(gate_up, "gate_up", 2);
  check(grad, "grad", 2);
  STD_TORCH_CHECK(grad.scalar_type() == gate_up.scalar_type(), "grad and gate_up must have one dtype");
  STD_TORCH_CHECK(grad.size(0) == gate_up.size(0) && 2 * grad.size(1) == gate_up.size(1),
                  "grad must have the rows of gate_up and half its width");
  Tensor grad_gate_up = empty_like(gate_up);
  const int64_t rows = grad.size(0), F = grad.size(1);
  dispatch(grad.scalar_type(), "swiglu_backward", [&](auto zero) {
    using Scalar = decltype(zero);
    const auto* grad_p = static_cast<const Scalar*>(grad.const_data_ptr());
    const auto* gate_up_p = static_cast<const Scalar*>(gate_up.const_data_ptr());
    auto* out_p = static_cast<Scalar*>(grad_gate_up.mutable_data_ptr());
    parallel_for(0, rows, grain(4 * F),
                 [&](int64_t begin, int64_t end) { backward_of(grad_p, gate_up_p, out_p, F, begin, end); });
  });
  return grad_gate_up;
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nucleus, m) {
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nucleus, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace mn
