// Private to csrc/cpu: the key of one band (the formula is in lsh.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "fastsft/common.h"
#include "fastsft/lsh.h"

namespace fastsft {

inline int64_t lsh_key(const uint32_t* values, int64_t n) {
  uint64_t h = 0x9E3779B97F4A7C15u;
  for (int64_t i = 0; i + 2 <= n; i += 2) {
    uint64_t two;
    std::memcpy(&two, values + i, sizeof(two));
    h = (h ^ two) * 0xBF58476D1CE4E5B9u;
    h ^= h >> 31;
  }
  if (n % 2 != 0) h = (h ^ values[n - 1]) * 0x94D049BB133111EBu;
  return static_cast<int64_t>(h ^ (h >> 29));
}

inline void check_shape(const char* op, LshShape shape, int64_t num_perm) {
  FASTSFT_CHECK(shape.bands >= 1 && shape.rows >= 1 && shape.bands <= num_perm / shape.rows, op,
                ": bands, rows: expected both >= 1 and bands * rows <= num_perm = ", num_perm, ", got ", shape.bands,
                " and ", shape.rows);
}

}  // namespace fastsft
