// Runs CUDA kernels on a CPU, slowly: every thread of a block is a coroutine, blocks run one after the other.
//
// Threads run in order until each waits at a barrier or in a warp's exchange; a barrier that not all living threads
// reach ends the process with a message. Shared memory is filled with noise before every block. Not modelled: races
// between threads that meet at no barrier (each runs alone), the time anything takes.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __restrict__ __restrict
#define __shared__ static  // blocks run one after the other; every kernel must write before it reads
#define MN_DYNAMIC_SHARED(Type, name) Type* name = reinterpret_cast<Type*>(cuda_on_cpu::dynamic_shared.data())

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx;

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
enum class State { ready, at_barrier, in_warp, done };

struct Thread {
  ucontext_t context;  // to begin on a stack of its own
  jmp_buf place;       // to go on: cheaper than a context, which asks the kernel for the signal mask
  std::unique_ptr<char[]> stack;
  State state = State::ready;
  bool begun = false;
};

inline std::vector<Thread> threads;
inline std::vector<uint64_t> exchange;  // one word of every thread
inline std::vector<uint64_t> dynamic_shared;
inline ucontext_t unused;
inline jmp_buf scheduler;
inline int current = 0;
inline const std::function<void()>* kernel = nullptr;

inline void run_thread() {
  (*kernel)();
  threads[current].state = State::done;
  _longjmp(scheduler, 1);
}

inline void wait(State state) {
  Thread& self = threads[current];
  self.state = state;
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

inline void go_on(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  swapcontext(&unused, &thread.context);
}

// Lets those go on that all wait at one place: the threads of a warp, or of the block.
inline bool release(int begin, int end, State state) {
  for (int i = begin; i < end; ++i) {
    if (threads[i].state != state && threads[i].state != State::done) return false;
  }
  bool any = false;
  for (int i = begin; i < end; ++i) {
    if (threads[i].state == state) {
      threads[i].state = State::ready;
      any = true;
    }
  }
  return any;
}

inline void run_block(int size) {
  constexpr size_t kStackBytes = 1 << 16;
  threads.resize(size);
  exchange.assign(size, 0);
  for (Thread& thread : threads) {
    if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, kStackBytes};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
    thread.state = State::ready;
    thread.begun = false;
  }
  for (;;) {
    for (current = 0; current < size; ++current) {
      if (threads[current].state != State::ready) continue;
      threadIdx.x = current;
      go_on(threads[current]);
    }
    bool moved = false, alive = false;
    for (int warp = 0; warp < size; warp += kWarpSize) moved |= release(warp, warp + kWarpSize, State::in_warp);
    if (!moved) moved = release(0, size, State::at_barrier);
    for (const Thread& thread : threads) alive |= thread.state != State::done;
    if (!alive) return;
    if (!moved) {
      std::fprintf(stderr, "threads of a block wait at different places\n");
      std::abort();
    }
  }
}

// grid blocks of `size` threads (a multiple of 32) with `shared_bytes` of dynamic shared memory.
inline void launch(int64_t grid, int size, size_t shared_bytes, const std::function<void()>& body) {
  kernel = &body;
  for (int64_t block = 0; block < grid; ++block) {
    dynamic_shared.assign(shared_bytes / 8 + 1, 0x7FF4BADC0FFEE000ull);  // a NaN in every width
    blockIdx.x = static_cast<unsigned>(block);
    run_block(size);
  }
}

template <typename Value>
uint64_t bits_of(Value value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(Value));
  return bits;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_barrier); }

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int lane_mask) {
  namespace c = cuda_on_cpu;
  const int self = c::current;
  c::exchange[self] = c::bits_of(value);
  c::wait(c::State::in_warp);
  Value other;
  std::memcpy(&other, &c::exchange[self ^ lane_mask], sizeof(Value));
  c::wait(c::State::in_warp);  // nobody may write the next value before all have read this one
  return other;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  namespace c = cuda_on_cpu;
  const int self = c::current, warp = self / c::kWarpSize * c::kWarpSize;
  c::exchange[self] = predicate;
  c::wait(c::State::in_warp);
  unsigned votes = 0;
  for (int lane = 0; lane < c::kWarpSize; ++lane) votes |= static_cast<unsigned>(c::exchange[warp + lane]) << lane;
  c::wait(c::State::in_warp);
  return votes;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
