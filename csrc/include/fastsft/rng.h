// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// A number is a pure function of (seed, stream, index), so results do not depend on order, threads or backend.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTSFT_HOST_DEVICE __host__ __device__
#else
#define FASTSFT_HOST_DEVICE
#endif

namespace fastsft {

struct Philox4 {
  uint32_t x[4];
};

// `stream` separates the users of one seed (documents, requests); `index` counts within a stream.
FASTSFT_HOST_DEVICE inline Philox4 philox(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in (0, 1), never 0 or 1: the 23 top bits, centred in their cell, exact in float32 (with 24 bits the half
// would not fit the significand and the top cell would round to 1).
FASTSFT_HOST_DEVICE inline float uniform_open(uint32_t bits) {
  return (static_cast<float>(bits >> 9) + 0.5f) * (1.0f / 8388608.0f);
}

// Uniform integer in [0, bound) for bound < 2^32 by the multiply-shift map; its bias is below bound / 2^32.
FASTSFT_HOST_DEVICE inline uint32_t uniform_below(uint32_t bits, uint32_t bound) {
  return static_cast<uint32_t>((static_cast<uint64_t>(bits) * bound) >> 32);
}

}  // namespace fastsft
