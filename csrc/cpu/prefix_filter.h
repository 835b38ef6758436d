// Private to csrc/cpu: the first filter of a similarity join. With the elements of all sets in one order, J(x, y) >= t
// means that x and y have at least ceil(t |x|) elements in common, hence one among the first |x| - ceil(t |x|) + 1 of
// x. The rarest come first. Sets that have too few elements in common with all others together end here.
//
// Per element: one increment and one look-up in a table of counts, a cache miss each, prefetched. What is left of a set
// sorts its prefix.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "shingle_sets.h"

namespace fastsft {

// What is left of a set after the filter.
struct PrefixSet {
  uint32_t id;
  uint32_t size;                 // of the whole set
  std::vector<uint64_t> shared;  // elements that another set may have
  std::vector<uint64_t> rarest;  // of those, as far as they are in the prefix: (count, hash), ascending
  uint32_t alone() const { return size - static_cast<uint32_t>(shared.size()); }  // elements that precede them
};

inline SetView view(const PrefixSet& set) { return {set.id, set.size, Shingles(set.shared)}; }

// Those of the distinct sets, by their order there, that may be similar to another. Set i has the id ids[i]. The
// threshold is above 0.
std::vector<PrefixSet> filter_by_prefix(std::span<const Shingles> sets, std::span<const uint32_t> ids,
                                        double threshold);

// The least number of common elements with any set that a set of this size needs.
inline int64_t least_common_with_any(int64_t size, double threshold) {
  int64_t common = std::max<int64_t>(static_cast<int64_t>(threshold * static_cast<double>(size)) - 1, 0);
  while (common < size && jaccard(common, size, common) < threshold) ++common;
  return common;
}

}  // namespace fastsft
