// Every pair of similar texts, without hashing bands: nothing is missed. Sets of shingles and similarities as in
// duplicates.h; the prefix, length and positional filters of Bayardo, Ma, Srikant, "Scaling up all pairs similarity
// search" (WWW 2007), and Xiao, Wang, Lin, Yu, "Efficient similarity joins for near duplicate detection" (WWW 2008).
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "fastsft/duplicates.h"
#include "fastsft/shingles.h"

namespace fastsft {

struct SimilarPair {
  int64_t x, y;  // x < y
  double similarity;
};

// All pairs of texts [n] whose similarity is at least `threshold`, by x, then y. Throws Error for a threshold outside
// (0, 1], an ngram < 1, a text of 2^32 - 64 bytes or more and 2^32 - 1 texts or more.
std::vector<SimilarPair> similar_pairs(const std::string_view* texts, int64_t n, double threshold,
                                       const ShingleOptions& shingles);

// near_duplicates with all pairs of similar texts for links. options.verify plays no part. Throws as similar_pairs
// does, and for a max_cluster < 0.
void all_pairs_clusters(const std::string_view* texts, int64_t n, const LinkOptions& options, int64_t* labels);

}  // namespace fastsft
