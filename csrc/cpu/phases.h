// Private to parallel.cpp: loops handed to threads that are already awake.
//
// The caller publishes one phase after the other; helpers take ranges of the current one as it does. A phase is over
// when its ranges are done, not when every helper has passed by: a helper that the system keeps waiting delays nothing
// but a range it has begun. Idle threads spin for some microseconds, then yield, so that an oversubscribed machine goes
// on.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "fastsft/parallel.h"

namespace fastsft {

class Phases {
 public:
  // Caller: all ranges of [0, n), fewer than 2^32; after the `last` phase the helpers leave. The first exception of a
  // range is rethrown after every range that began has ended; ranges that have not begun then are dropped.
  void run(int64_t n, int64_t grain, detail::RangeFn fn, void* context, bool last) {
    const int64_t ranges = (n + grain - 1) / grain;
    // Nobody holds a range of the phase before, and a helper that reads these fields too late fails to take one: they
    // are released after the ticket ran out.
    fn_.store(fn, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    n_.store(n, std::memory_order_release);
    grain_.store(grain, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    ++phase_;
    ticket_.store(phase_ << kPhaseShift | (last ? kLast : 0) | static_cast<uint64_t>(ranges),
                  std::memory_order_release);
    while (left(ticket_.load(std::memory_order_acquire)) > 0) take();
    for (int idle = 0; done_.load(std::memory_order_acquire) != ranges; ++idle) wait(idle);
    if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(error_);
  }

  void close() { run(0, 1, nullptr, nullptr, true); }

  // Helper: until the last phase has run out.
  void help() {
    for (int idle = 0;; ++idle) {
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (left(ticket) > 0) {
        take();
        idle = 0;
      } else if (ticket & kLast) {
        return;
      } else {
        wait(idle);
      }
    }
  }

 private:
  // A ticket: the phase's number, whether it is the last, and how many ranges nobody has taken yet.
  static constexpr int kPhaseShift = 33;
  static constexpr uint64_t kLast = uint64_t{1} << 32;
  static int64_t left(uint64_t ticket) { return static_cast<int64_t>(ticket & (kLast - 1)); }

  static void wait(int idle) {
    constexpr int kSpins = 2000;  // tens of microseconds
    if (idle >= kSpins) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void take() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    if (left(ticket) == 0) return;
    const detail::RangeFn fn = fn_.load(std::memory_order_acquire);
    void* const context = context_.load(std::memory_order_acquire);
    const int64_t n = n_.load(std::memory_order_acquire), grain = grain_.load(std::memory_order_acquire);
    if (!ticket_.compare_exchange_strong(ticket, ticket - 1, std::memory_order_acq_rel)) return;
    if (!failed_.load(std::memory_order_relaxed)) {
      const int64_t begin = ((n + grain - 1) / grain - left(ticket)) * grain;
      try {
        fn(context, begin, std::min(begin + grain, n));
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
    done_.fetch_add(1, std::memory_order_acq_rel);
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<detail::RangeFn> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> n_{0}, grain_{1};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_{};  // written once per phase, by the thread that sets `failed_`
  uint64_t phase_ = 0;          // the caller's
};

}  // namespace fastsft
