// Private to csrc/cpu: single linkage with a limit of size.
#pragma once

#include <cstdint>
#include <vector>

#include "shingle_sets.h"

namespace fastsft {

struct SimilarSets {
  double similarity;
  uint32_t x, y;
};

// Joins the pairs in order of descending similarity, equal ones in that of the two sets' fingerprints, each unless its
// two clusters have more than max_cluster members together. cluster [sets] becomes the number of one set of its cluster
// for each set. The fingerprints are distinct, so that the result depends on the sets alone, not on their numbers.
std::vector<uint32_t> capped_linkage(std::vector<SimilarSets> pairs, const std::vector<Fingerprint>& prints,
                                     int64_t max_cluster);

// The connected components of the pairs, in the same form; those of more than max_cluster sets (0: no limit) by
// capped_linkage.
std::vector<uint32_t> linkage_within(std::vector<SimilarSets> pairs, const std::vector<Fingerprint>& prints,
                                     int64_t max_cluster);

}  // namespace fastsft
