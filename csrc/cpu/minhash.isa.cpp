// Per shingle: num_perm multiply-add-min in 32-bit lanes, with the factors and the running minima in registers.
#include <cstdint>
#include <cstring>

namespace fastsft::FASTSFT_ISA_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
typedef uint32_t Vec __attribute__((vector_size(kVectorBytes)));

inline Vec load(const uint32_t* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

}  // namespace

// signature [padded] = min of itself and, over shingles, of a * h + b, for a, b [padded], padded a multiple of 64.
void sketch(const uint32_t* shingles, int64_t n, const uint32_t* a, const uint32_t* b, int64_t padded,
            uint32_t* signature) {
  constexpr int kGroup = 4;  // vectors at a time: with their factors they fill, but do not exceed, 16 registers
  for (int64_t j = 0; j < padded; j += kGroup * kLanes) {
    Vec va[kGroup], vb[kGroup], least[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      va[g] = load(a + j + g * kLanes);
      vb[g] = load(b + j + g * kLanes);
      least[g] = load(signature + j + g * kLanes);
    }
    for (int64_t i = 0; i < n; ++i) {
      const Vec h = shingles[i] - Vec{};
      for (int g = 0; g < kGroup; ++g) {
        const Vec x = va[g] * h + vb[g];
        least[g] = x < least[g] ? x : least[g];
      }
    }
    for (int g = 0; g < kGroup; ++g) std::memcpy(signature + j + g * kLanes, &least[g], sizeof(Vec));
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
