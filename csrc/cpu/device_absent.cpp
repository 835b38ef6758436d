// Stands in for csrc/cuda/device.cu in a CPU-only build.
#include "fastsft/device.h"

namespace fastsft {

std::string cuda_architectures() { return ""; }
int cuda_device_count() { return -1; }

}  // namespace fastsft
