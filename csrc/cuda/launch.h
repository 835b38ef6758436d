// The one way to start a kernel, and what launch code asks the device for. Under FASTSFT_CUDA_HOST (tests/cuda_host)
// the kernel runs in the emulator, so that grids and shared-memory sizes are tested too.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(FASTSFT_CUDA_HOST)
#include <cstring>

#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastsft::cuda {

inline constexpr std::size_t kSharedWithoutOptIn = 48 * 1024;

// "fastsft::cuda::{anonymous}::loss_stats_kernel<...>"
template <auto kKernel>
std::string kernel_name() {
  const std::string_view text = __PRETTY_FUNCTION__;  // "... [with auto kKernel = NAME; ...]"
  const std::size_t begin = text.find("kKernel = ") + 10;
  return std::string(text.substr(begin, text.rfind(';') - begin));
}

// Starts kKernel(args...) on `stream` (a cudaStream_t) of the current device: blocks of one dimension, `threads` a
// multiple of 32, `shared_bytes` of dynamic shared memory. An empty grid is nothing to do. Throws std::runtime_error
// naming the kernel if the launch fails.
template <auto kKernel, typename... Args>
void launch(dim3 grid, int threads, std::size_t shared_bytes, void* stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(FASTSFT_CUDA_HOST)
  (void)stream;
  cuda_host::launch(kernel_name<kKernel>(), grid, static_cast<unsigned>(threads), shared_bytes,
                    [&] { kKernel(args...); });
#else
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutOptIn) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kKernel, args...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // reported here, not left behind for the next caller
    throw std::runtime_error(kernel_name<kKernel>() + ": launch of (" + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z) + ") blocks of " +
                             std::to_string(threads) + " threads with " + std::to_string(shared_bytes) +
                             " bytes of shared memory failed: " + cudaGetErrorString(error));
  }
#endif
}

// Sets `bytes` bytes at `data` to `value`, in the order of the stream.
inline void fill_bytes(void* data, int value, std::size_t bytes, void* stream) {
#if defined(FASTSFT_CUDA_HOST)
  (void)stream;
  std::memset(data, value, bytes);
#else
  const cudaError_t error = cudaMemsetAsync(data, value, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string("cudaMemsetAsync: ") + cudaGetErrorString(error));
#endif
}

// Whether the current device is a Hopper and kernels for it (sm_90a, whose code runs nowhere else) were compiled.
inline bool runs_sm90a() {
#if defined(FASTSFT_CUDA_HOST)
  return cuda_host::compute_capability == 90;
#else
  if (std::string_view(FASTSFT_CUDA_ARCHITECTURES).find("90a") == std::string_view::npos) return false;
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("current device: ") + cudaGetErrorString(error));
  return major == 9 && minor == 0;
#endif
}

// Of the current device: the size of a persistent grid.
inline int multiprocessor_count() {
#if defined(FASTSFT_CUDA_HOST)
  return cuda_host::multiprocessors;
#else
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("current device: ") + cudaGetErrorString(error));
  return count;
#endif
}

}  // namespace fastsft::cuda
