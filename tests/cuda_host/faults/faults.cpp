// Kernels with a fault each, named by the argument, that the sanitizers must report: ctest expects a failure (see
// CMakeLists.txt). "none" is the sound kernel, which must pass.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"
#include "primitives.cuh"

using namespace fastsft::cuda;

namespace {

constexpr int kThreads = 64;

// Reverses kThreads floats per block through shared memory.
void reverse(const std::string& fault) {
  std::vector<float> in(2 * kThreads), out(2 * kThreads);
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = static_cast<float>(i);
  const std::size_t shared_bytes = kThreads * 4 - (fault == "shared_out_of_bounds" ? 4 : 0);
  cuda_host::launch("reverse", 2, kThreads, shared_bytes, [&] {
    float* const tile = shared_memory<float>();
    const int thread = static_cast<int>(threadIdx.x), base = static_cast<int>(blockIdx.x) * kThreads;
    if (fault == "copy_not_waited_for") {
      copy_async<4>(tile + thread, &in[base + thread]);
      copy_async_commit();
    } else {
      tile[thread] = in[base + thread];
    }
    if (fault == "shuffle_as_barrier")
      shuffle(thread, 0);
    else if (fault == "warp_barrier_for_block")
      sync_warp();
    else if (fault != "missing_barrier")
      __syncthreads();
    const float value = tile[kThreads - 1 - thread];
    if (fault == "copy_not_waited_for") {
      copy_async_wait<0>();
      __syncthreads();
    }
    if (fault == "blocks_overlap")
      out[thread] = value;
    else if (fault == "global_out_of_bounds")
      out.data()[base + thread + 1] = value;
    else if (fault == "missing_atomic")
      out[base] += value;
    else
      out[base + thread] = value;
  });
  if (fault.starts_with("missing_a") || fault == "blocks_overlap") return;
  for (int i = 0; i < 2 * kThreads; ++i) {
    const float expected = static_cast<float>(i / kThreads * kThreads + kThreads - 1 - i % kThreads);
    if (out[i] != expected) {
      std::printf("element %d: got %g, expected %g\n", i, out[i], expected);
      std::exit(2);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  reverse(argc > 1 ? argv[1] : "none");
  std::printf("no fault seen\n");
}
