// What the CUDA part of the build is for.
#pragma once

#include <string>

namespace fastsft {

std::string cuda_architectures();  // as compiled in, e.g. "80;90a"; empty in a CPU-only build

}  // namespace fastsft
