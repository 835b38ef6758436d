// CUDA's built-ins and the names of csrc/cuda/primitives.cuh for the host compiler, so that a kernel's own source runs
// on the CPU: every thread of a block is an OS thread, blocks run one after the other, __syncthreads and shuffles are
// barriers.
//
// What it finds: out-of-bounds and uninitialised shared or global memory (AddressSanitizer), data races between
// barriers (ThreadSanitizer), and a barrier that not all threads of a block (or lanes of a warp) reach, which is
// reported by name. A test tool: it is slow, and it says nothing about speed, registers or memory ordering between
// blocks.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // blocks run one at a time

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_host {

// A barrier that knows when it can never open: some threads wait while another has already returned.
class Barrier {
 public:
  Barrier(const char* name, int threads) : name_(name), threads_(threads) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t generation = generation_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++generation_;
      changed_.notify_all();
      return;
    }
    check();
    changed_.wait(lock, [&] { return generation_ != generation || broken_; });
    if (broken_) throw std::logic_error(message());
  }

  void leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++left_;
    check();
  }

 private:
  std::string message() const { return std::string(name_) + " was not reached by all threads"; }
  void check() {
    if (waiting_ > 0 && left_ > 0) {
      broken_ = true;
      changed_.notify_all();
    }
  }

  const char* name_;
  const int threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0, left_ = 0;
  uint64_t generation_ = 0;
  bool broken_ = false;
};

struct Warp {
  explicit Warp(int lanes) : barrier("a warp shuffle", lanes) {}
  Barrier barrier;
  float values[32];
};

struct Thread {
  Barrier* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
};

inline thread_local Thread t_thread;

}  // namespace cuda_host

inline thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_host::t_thread.block->wait(); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

namespace fastsft::cuda {

inline constexpr int kWarp = 32;

inline float shuffle_xor(float value, int mask) {
  cuda_host::Thread& self = cuda_host::t_thread;
  self.warp->values[self.lane] = value;
  self.warp->barrier.wait();
  const float other = self.warp->values[self.lane ^ mask];
  self.warp->barrier.wait();  // nobody writes the next value before all have read this one
  return other;
}

inline float half_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -value : value;
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = size < 0x1p-14f ? -24 : exponent - 11;  // weight of the last bit
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // A mantissa that rounds up to 2048 carries into the exponent field by itself.
  return sign | static_cast<uint16_t>(size < 0x1p-14f ? steps : ((unit + 25) << 10) + (steps - 1024));
}

}  // namespace fastsft::cuda

namespace cuda_host {

// Runs kernel() for every thread of every block, x dimensions only; the threads are reused from block to block.
// Rethrows what a thread threw, after the block it happened in.
inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  struct Block {
    explicit Block(unsigned threads) : barrier("__syncthreads", static_cast<int>(threads)) {
      for (unsigned first = 0; first < threads; first += 32) {
        warps.push_back(std::make_unique<Warp>(static_cast<int>(std::min(32u, threads - first))));
      }
    }
    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;
  };
  std::vector<std::unique_ptr<Block>> states;
  for (unsigned b = 0; b < blocks; ++b) states.push_back(std::make_unique<Block>(threads));
  std::barrier between(static_cast<std::ptrdiff_t>(threads));
  std::mutex mutex;
  std::exception_ptr error;
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      threadIdx = {t};
      blockDim = {threads};
      gridDim = {blocks};
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx = {b};
        Warp& warp = *states[b]->warps[t / 32];
        t_thread = {&states[b]->barrier, &warp, static_cast<int>(t % 32)};
        try {
          kernel();
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
        states[b]->barrier.leave();
        warp.barrier.leave();
        between.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace cuda_host
