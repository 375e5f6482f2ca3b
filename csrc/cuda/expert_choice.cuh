// Expert choice on a GPU: scores, each expert's best C tokens of each image, and their renormalised weights.
//
// Four kernels forward and two backward; nothing is sorted but the C winners of a row, and nothing is added atomically
// but counts in shared memory, so every run gives the same bits. Ties go to the earlier token.
//
//   scores   [B, S, E] -> [B, E, S]   softmax (or sigmoid) in fp32, rounded to the logits' dtype, transposed by tiles
//   choose   one block per (image, expert): radix selection of the C-th largest score, then a sort of the C winners
//   totals   one thread per token: sum of its scores over the experts that took it
//   weigh    one thread per (image, expert, winner)
//
// The file uses no part of torch but its number types, so tests/ops/cuda_on_cpu.h can run it on a CPU.
#pragma once

#include "common.cuh"

namespace mn::cuda {

constexpr int kTileTokens = 32;
constexpr int kMaxExperts = 256;  // a lane keeps its experts' scores in registers
constexpr int kPerLane = kMaxExperts / kWarp;

// What `choose` leaves for the later kernels: a token is taken if its key is above `key`, or equals it at a position up
// to `last`.
struct Cut {
  uint32_t key;
  int32_t last;
};

// Unsigned integers in the order of the floats; a NaN is above everything, as in torch.topk.
__device__ inline uint32_t order_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0xFFFFFFFFu;
  return bits ^ ((bits & 0x80000000u) ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ inline bool taken(float score, int32_t token, const Cut& cut) {
  const uint32_t key = order_key(score);
  return key > cut.key || (key == cut.key && token <= cut.last);
}

// One warp: fp32 scores of one token's logits; lane l has the experts l, l + 32, ...
template <typename T>
__device__ inline void score_token(const T* logits_E, int experts, bool use_sigmoid, int lane, float (&score)[kPerLane]) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + i * kWarp;
    score[i] = e < experts ? static_cast<float>(logits_E[e]) : -INFINITY;
    largest = fmaxf(largest, score[i]);
  }
  if (use_sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) score[i] = 1.0f / (1.0f + expf(-score[i]));
    return;
  }
  largest = warp_max(largest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + i * kWarp < experts) {
      score[i] = expf(score[i] - largest);
      sum += score[i];
    }
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) score[i] = score[i] / sum;
}

// Block (tile of 32 tokens, image). Shared: float [experts][kTileTokens + 1].
template <typename T>
__global__ void scores(const T* __restrict__ logits_BSE, T* __restrict__ score_BES, int tokens, int experts, int tiles,
                       bool use_sigmoid) {
  MN_DYNAMIC_SHARED(float, tile);
  const int64_t image = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * kTileTokens;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int t = warp; t < kTileTokens && first + t < tokens; t += kWarps) {
    float score[kPerLane];
    score_token(logits_BSE + (image * tokens + first + t) * experts, experts, use_sigmoid, lane, score);
    for (int i = 0; i < kPerLane; ++i) {
      const int e = lane + i * kWarp;
      if (e < experts) tile[e * (kTileTokens + 1) + t] = score[i];
    }
  }
  __syncthreads();
  const int token = first + lane;
  if (token >= tokens) return;
  for (int e = warp; e < experts; e += kWarps) {
    score_BES[(image * experts + e) * tokens + token] = static_cast<T>(tile[e * (kTileTokens + 1) + lane]);
  }
}

// The byte of the C-th largest key, given how many keys have each byte: the largest byte with at least `wanted` keys at
// or above it. Leaves in `wanted` how many of the keys with that byte are still to be taken.
__device__ inline uint32_t pick_byte(uint32_t* count, uint32_t* found, uint32_t& wanted) {
  const int bin = threadIdx.x;
  for (int step = 1; step < 256; step *= 2) {  // sums from the end: count[bin] becomes the keys with a byte >= bin
    const uint32_t more = bin + step < 256 ? count[bin + step] : 0;
    __syncthreads();
    count[bin] += more;
    __syncthreads();
  }
  const uint32_t above = bin < 255 ? count[bin + 1] : 0;
  if (count[bin] >= wanted && above < wanted) {
    found[0] = bin;
    found[1] = wanted - above;
  }
  __syncthreads();
  wanted = found[1];
  return found[0];
}

// Sorts 2^k items, largest first, with one block.
__device__ inline void sort_descending(uint64_t* items, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int other = i ^ step;
        const bool descending = (i & run) == 0;
        if (other > i && (items[i] < items[other]) == descending) {
          const uint64_t item = items[i];
          items[i] = items[other];
          items[other] = item;
        }
      }
    }
  }
  __syncthreads();
}

// Block (image, expert). sorted: 2^k >= capacity. scratch: [rows, sorted] in global memory, or null: then shared memory
// holds uint64 [sorted].
template <typename T>
__global__ void choose(const T* __restrict__ score_BES, int64_t* __restrict__ index_BEC, T* __restrict__ taken_BEC,
                       Cut* __restrict__ cut_BE, uint64_t* scratch, int tokens, int capacity, int sorted) {
  MN_DYNAMIC_SHARED(uint64_t, shared_items);
  __shared__ uint32_t count[256];
  __shared__ uint32_t found[2];
  __shared__ uint32_t filled;
  __shared__ uint32_t equals_of_warp[kWarps];
  const int64_t row = blockIdx.x;
  const T* score_S = score_BES + row * tokens;
  uint64_t* items = scratch == nullptr ? shared_items : scratch + row * sorted;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  uint32_t threshold = 0, mask = 0, wanted = capacity;
  for (int shift = 24; shift >= 0; shift -= 8) {
    count[threadIdx.x] = 0;
    __syncthreads();
    for (int s = threadIdx.x; s < tokens; s += kThreads) {
      const uint32_t key = order_key(static_cast<float>(score_S[s]));
      if ((key & mask) == threshold) atomicAdd(&count[(key >> shift) & 255u], 1u);
    }
    __syncthreads();
    threshold |= pick_byte(count, found, wanted) << shift;
    mask |= 255u << shift;
    __syncthreads();
  }

  // Winners in any order (the sort makes it definite); of the tokens at the threshold the first `wanted`.
  for (int i = threadIdx.x; i < sorted; i += kThreads) items[i] = 0;  // below every winner
  if (threadIdx.x == 0) filled = 0;
  __syncthreads();
  uint32_t equals_before = 0;
  for (int first = 0; first < tokens; first += kThreads) {
    const int s = first + static_cast<int>(threadIdx.x);
    const uint32_t key = s < tokens ? order_key(static_cast<float>(score_S[s])) : 0;
    const bool equal = s < tokens && key == threshold;
    const unsigned equals = __ballot_sync(kAllLanes, equal);
    if (lane == 0) equals_of_warp[warp] = __popc(equals);
    __syncthreads();
    uint32_t rank = equals_before + __popc(equals & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) rank += equals_of_warp[w];
      equals_before += equals_of_warp[w];
    }
    if ((s < tokens && key > threshold) || (equal && rank < wanted)) {
      items[atomicAdd(&filled, 1u)] = (static_cast<uint64_t>(key) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(s));
    }
    if (equal && rank + 1 == wanted) cut_BE[row] = Cut{threshold, s};
    __syncthreads();
  }
  sort_descending(items, sorted);
  for (int c = threadIdx.x; c < capacity; c += kThreads) {
    const int64_t s = 0xFFFFFFFFu - static_cast<uint32_t>(items[c]);
    index_BEC[row * capacity + c] = s;
    taken_BEC[row * capacity + c] = score_S[s];
  }
}

// Thread (image, token). Sums in fp32 in the order of the experts, then rounds to the logits' dtype.
template <typename T>
__global__ void totals(const T* __restrict__ score_BES, const Cut* __restrict__ cut_BE, T* __restrict__ total_BS,
                       int64_t images, int tokens, int experts) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= images * tokens) return;
  const int64_t image = at / tokens;
  const int32_t token = static_cast<int32_t>(at % tokens);
  float sum = 0.0f;
  for (int e = 0; e < experts; ++e) {
    const float score = static_cast<float>(score_BES[(image * experts + e) * tokens + token]);
    if (taken(score, token, cut_BE[image * experts + e])) sum += score;
  }
  total_BS[at] = static_cast<T>(sum);
}

// total + 1e-12, rounded to T as the reference does; 1 where that is 0, as it may be in half precision.
template <typename T>
__device__ inline float floored(T total) {
  const float sum = static_cast<float>(static_cast<T>(static_cast<float>(total) + 1e-12f));
  return sum == 0.0f ? 1.0f : sum;
}

// Thread (image, expert, winner): score / (total + 1e-12) * route_scale, every step rounded to T as in the reference.
template <typename T>
__global__ void weigh(const int64_t* __restrict__ index_BEC, const T* __restrict__ taken_BEC,
                      const T* __restrict__ total_BS, T* __restrict__ weight_BEC, int64_t picks, int64_t picks_of_image,
                      int tokens, float route_scale) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= picks) return;
  const T total = total_BS[at / picks_of_image * tokens + index_BEC[at]];
  const T share = static_cast<T>(static_cast<float>(taken_BEC[at]) / floored(total));
  weight_BEC[at] = static_cast<T>(static_cast<float>(share) * route_scale);
}

// Thread (image, expert, winner): the gradient of a weight to the place of its token. The rest of grad_BES is zero.
template <typename T>
__global__ void spread(const int64_t* __restrict__ index_BEC, const T* __restrict__ grad_BEC, float* __restrict__ grad_BES,
                       int64_t picks, int capacity, int tokens) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < picks) grad_BES[at / capacity * tokens + index_BEC[at]] = static_cast<float>(grad_BEC[at]);
}

// Block (tile of 32 tokens, image). With w_e = scale * s_e / t and t the sum of the taken s_e:
//   ds_e = scale / t * (g_e - sum over taken of g * s / t), for the taken e
//   softmax: dl_e = p_e * (ds_e - sum p * ds);   sigmoid: dl_e = p_e * (1 - p_e) * ds_e
// Scores are formed again from the logits. Shared: float [experts][kTileTokens + 1], the gradients of the weights.
template <typename T>
__global__ void backward(const T* __restrict__ logits_BSE, const float* __restrict__ grad_BES,
                         const Cut* __restrict__ cut_BE, const T* __restrict__ total_BS, T* __restrict__ grad_BSE,
                         int tokens, int experts, int tiles, bool use_sigmoid, float route_scale) {
  MN_DYNAMIC_SHARED(float, tile);
  const int64_t image = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * kTileTokens;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int e = warp; e < experts; e += kWarps) {
    const int token = first + lane;
    tile[e * (kTileTokens + 1) + lane] = token < tokens ? grad_BES[(image * experts + e) * tokens + token] : 0.0f;
  }
  __syncthreads();
  for (int t = warp; t < kTileTokens && first + t < tokens; t += kWarps) {
    const int64_t token = image * tokens + first + t;
    float score[kPerLane], grad[kPerLane];
    score_token(logits_BSE + token * experts, experts, use_sigmoid, lane, score);
    const float total = floored(total_BS[token]);
    float mean = 0.0f;
    uint32_t mine = 0;  // bit i: expert lane + 32 i took the token
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = lane + i * kWarp;
      grad[i] = 0.0f;
      if (e >= experts) continue;
      const float rounded = static_cast<float>(static_cast<T>(score[i]));
      if (!taken(rounded, first + t, cut_BE[image * experts + e])) continue;
      mine |= 1u << i;
      grad[i] = tile[e * (kTileTokens + 1) + t];
      mean += grad[i] * rounded / total;
    }
    mean = warp_sum(mean);
    float inner = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((mine >> i & 1u) == 0) continue;
      grad[i] = route_scale / total * (grad[i] - mean);
      inner += score[i] * grad[i];
    }
    inner = warp_sum(inner);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = lane + i * kWarp;
      const float slope = use_sigmoid ? (1.0f - score[i]) * grad[i] : grad[i] - inner;
      if (e < experts) grad_BSE[token * experts + e] = static_cast<T>(score[i] * slope);
    }
  }
}

}  // namespace mn::cuda
