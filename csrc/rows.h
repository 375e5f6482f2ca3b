// Statistics of one row, and the chunks over which sums of many rows run, for all normalisations.
#pragma once

#include <cmath>

#include "common.h"

namespace mn {

constexpr int64_t kTokensPerChunk = 64;

inline int64_t chunks_of(int64_t items, int64_t size) { return (items + size - 1) / size; }

template <typename T>
struct Moments {
  Wide<T> mean, inverse_std;
};

template <typename T>
MN_INLINE Moments<T> moments(const T* __restrict x, int64_t D, Wide<T> eps) {
  Wide<T> sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += static_cast<Wide<T>>(x[d]);
  const Wide<T> mean = sum / D;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < D; ++d) {
    const Wide<T> centred = static_cast<Wide<T>>(x[d]) - mean;
    squares += centred * centred;
  }
  return {mean, Wide<T>(1) / std::sqrt(squares / D + eps)};
}

template <typename T>
MN_INLINE Wide<T> inverse_rms(const T* __restrict x, int64_t D, Wide<T> eps) {
  Wide<T> squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < D; ++d) squares += static_cast<Wide<T>>(x[d]) * static_cast<Wide<T>>(x[d]);
  return Wide<T>(1) / std::sqrt(squares / D + eps);
}

}  // namespace mn
