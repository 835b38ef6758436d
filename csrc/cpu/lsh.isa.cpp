// Reads both rows once, one vector comparison and subtraction per vector.
#include <cstdint>

namespace fastsft::FASTSFT_ISA_NS {

// Number of equal positions of two rows [n].
int64_t count_equal(const uint32_t* x, const uint32_t* y, int64_t n) {
  uint32_t equal = 0;
  for (int64_t i = 0; i < n; ++i) equal += x[i] == y[i];
  return equal;
}

}  // namespace fastsft::FASTSFT_ISA_NS
