// Private to csrc/cpu: all pairs of similar sets.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "shingle_sets.h"

namespace fastsft {

struct SimilarSets {
  double similarity;
  uint32_t x, y;
};

struct SimilarityJoin {
  std::vector<uint32_t> set_of;     // [texts]: equal for texts with equal sets, numbered by the first text with each
  std::vector<Fingerprint> prints;  // [sets]
  std::vector<SimilarSets> pairs;   // of different sets; in no order to rely on
};

// Components of more than whole_above sets have every pair, others only pairs that connect them.
SimilarityJoin join_all_pairs(const std::string_view* texts, int64_t n, double threshold, const ShingleOptions& options,
                              int64_t whole_above);

}  // namespace fastsft
