#include <cuda_runtime.h>

#include "fastsft/device.h"

namespace fastsft {

std::string cuda_architectures() { return FASTSFT_CUDA_ARCHITECTURES; }

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // an absent driver is an answer, not an error to leave behind
    return -1;
  }
  return count;
}

}  // namespace fastsft
