// Private to csrc/cpu: the threads of torch's OpenMP runtime, borrowed.
//
// After each parallel region of torch, its OpenMP workers spin for milliseconds, waiting for the next. A second pool
// then competes with them for the same cores and gets half of each. So where torch is loaded, parallel_for runs on
// those very workers, which are awake and wake in a microsecond. No OpenMP is linked: the entry point that compilers
// emit calls to (GOMP_parallel, also offered by the LLVM and Intel runtimes) is looked up in what libtorch_cpu itself
// uses.
//
// Hazard: libgomp's workers do not exist in a forked child, and its next region there would hang. The caller must not
// use a team in a process that was forked after the team was found.
#pragma once

namespace fastsft {

// Runs fn(context) once on each of `threads` threads, the caller among them, and returns when all are done; fn must not
// throw. Null where torch is not loaded or brings no such runtime.
using HostTeam = void (*)(void (*fn)(void*), void* context, unsigned threads, unsigned flags);
HostTeam find_host_team();

}  // namespace fastsft
