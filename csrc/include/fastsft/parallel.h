// Loops over threads: torch's own OpenMP workers where torch is loaded (csrc/cpu/host_team.h says why), otherwise a
// pool of the package. A forked child, such as a DataLoader worker, always has the latter: libgomp would hang there.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace fastsft {

// Number of threads a parallel_for may use, the caller included. The first value is FASTSFT_NUM_THREADS, or else the
// size of the process's affinity mask. In a forked child it is 1 unless FASTSFT_NUM_THREADS is set or the child calls
// set_num_threads. Throws Error for n outside [1, 1024].
int num_threads();
void set_num_threads(int n);

namespace detail {
using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
void run_ranges(int64_t n, int64_t grain, RangeFn fn, void* context);
void run_with_team(void (*fn)(void* context), void* context);
}  // namespace detail

// Calls fn(begin, end) on disjoint ranges that cover [0, n), each of at most `grain` items (the last may be shorter),
// handed out in ascending order to whichever thread is free. Returns when all are done. Which thread runs a range
// varies from run to run, so the result of a range must not depend on the thread. Serial when n <= grain, inside
// another parallel_for, or while another thread is using the pool. The first exception thrown by fn is rethrown here,
// after every started range ended.
template <typename Fn>
void parallel_for(int64_t n, int64_t grain, Fn&& fn) {
  using F = std::remove_reference_t<Fn>;
  detail::run_ranges(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
}

// Calls fn() while the other threads stay awake, waiting for its loops: a parallel_for that this thread calls inside
// costs about a microsecond, which is what a chain of small loops wants (a decoding step has dozens). Serial where a
// parallel_for would be. Meant for milliseconds: a thread that finds nothing to do spins, then yields, but never
// sleeps.
template <typename Fn>
void with_team(Fn&& fn) {
  using F = std::remove_reference_t<Fn>;
  detail::run_with_team([](void* context) { (*static_cast<F*>(context))(); },
                        const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
}

}  // namespace fastsft
