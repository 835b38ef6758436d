// Runs a kernel on the host: every thread of a block is a fibre of one OS thread that runs until it has to wait for
// others; blocks run one after another in a fixed, scrambled order. See docs/cuda-emulation.md.
//
// Here is what the stand-ins for csrc/cuda/primitives*.cuh are built from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "builtins.h"

namespace cuda_host {

// A rule of the programming model was broken; the text names kernel, block and thread.
struct Fault : std::logic_error {
  using std::logic_error::logic_error;
};

// Unwritten shared memory, and the target of an asynchronous copy until it has landed: NaN in every float format.
inline constexpr unsigned char kPoison = 0xff;

// Runs `body` once per thread. Throws the first Fault, or what the body threw.
void launch(const std::string& kernel, Dim3 grid, unsigned threads, std::size_t shared_bytes,
            const std::function<void()>& body);

// What multiprocessor_count() of launch.h says: few, so that persistent kernels go round their loop.
inline int multiprocessors = 3;

// What runs_sm90a() of launch.h asks for.
inline int compute_capability = 80;

// What shared_per_multiprocessor() of attention_launch.cuh says: launch code trades stages of copies for blocks by it.
inline std::size_t shared_per_multiprocessor = 228 * 1024;

// --- called by the thread that runs ---------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what);

// Throws unless [data, data + bytes) lies in the block's shared memory and is aligned.
void check_shared(const char* name, const void* data, std::size_t bytes, std::size_t alignment);
void check_aligned(const char* name, const void* data, std::size_t alignment);
std::byte* shared_memory();

// A collective operation: waits until all lanes of the warp (or all 128 threads of the warpgroup) are at an operation
// of this name; the last one runs combine(arguments), arguments[i] being lane i's. Orders no memory accesses.
using Combine = void (*)(void* const* arguments);
void meet_warp(const char* name, void* argument, Combine combine);
void meet_warpgroup(const char* name, void* argument, Combine combine);

// The same as a barrier: what the lanes did before happened before what they do after.
void sync_warp();

// Barrier `id` of the block, for `threads` threads; without `wait` the thread only arrives.
void barrier(const char* name, int id, int threads, bool wait);

// Orders this thread's accesses and those of every thread that fenced before it or will after.
void thread_fence();

// --- cp.async: the target is poisoned at the start and written at the wait, so that a read in between gives NaN -----
void start_copy(void* shared, const void* global, int bytes, bool valid);
void commit_copies();
void wait_for_copies(int groups_left);

}  // namespace cuda_host
