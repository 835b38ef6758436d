// Stands in for csrc/cuda/device.cu in a CPU-only build.
#include "fastsft/device.h"

namespace fastsft {

std::string cuda_architectures() { return ""; }

}  // namespace fastsft
