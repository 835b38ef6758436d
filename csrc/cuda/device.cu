#include "fastsft/device.h"

namespace fastsft {

std::string cuda_architectures() { return FASTSFT_CUDA_ARCHITECTURES; }

}  // namespace fastsft
