// Private to csrc/cpu: pairs of similar sets among many, found by an index of rare elements instead of by comparing all
// with all. A set looks up the rarest of its elements, counts what it has in common with the sets found, and is
// compared with those that may be similar: the prefix, length and positional filters that all_pairs.h names.
#pragma once

#include <cstdint>
#include <vector>

#include "forest.h"
#include "prefix_filter.h"
#include "prefix_index.h"

namespace fastsft {

struct SimilarSets {
  double similarity;
  uint32_t x, y;  // ids
};

class SetJoin {
 public:
  // Distinct sets of one filter_by_prefix with this threshold. They must outlive the join.
  SetJoin(std::vector<const PrefixSet*> sets, double threshold);

  // All of them, in no order to rely on.
  std::vector<SimilarSets> pairs() const;

  // Joins the ids of each in `components`. Where n sets are similar to each other, that takes n - 1 of n^2 / 2 pairs:
  // neighbours in the long lists of the index are compared first; what they connect stands together in each list, so
  // that a set steps over all that it is connected to. Once for a SetJoin.
  void connect(const Forest<uint32_t>& components);

 private:
  std::vector<uint32_t> roots(const Forest<uint32_t>& components) const;

  std::vector<const PrefixSet*> sets_;  // in ascending order of size
  double threshold_;
  PrefixIndex index_;
};

}  // namespace fastsft
