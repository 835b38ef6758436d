// What the CUDA part of the build can do on this machine. Safe to call with no GPU and no driver.
#pragma once

#include <string>

namespace fastsft {

std::string cuda_architectures();  // as compiled in, e.g. "80;90a"; empty in a CPU-only build
int cuda_device_count();           // -1 without a driver or in a CPU-only build

}  // namespace fastsft
