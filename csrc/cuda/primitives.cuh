// The only file with hardware instructions and intrinsics. tests/cuda_host/primitives_host.h supplies the same names
// for the host compiler, so that the kernels' own source runs there.
#pragma once

#if defined(FASTSFT_CUDA_HOST)
#include "primitives_host.h"
#else

#include <cstdint>

namespace fastsft::cuda {

inline constexpr int kWarp = 32;

// The value of the lane whose number differs in the bits of `mask`; all 32 lanes take part.
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

}  // namespace fastsft::cuda

#endif
