// Private to csrc/cpu: single linkage with a limit of size.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "forest.h"
#include "shingle_sets.h"

namespace fastsft {

struct SimilarSets {
  double similarity;
  uint32_t x, y;
};

// Joins pairs of sets in order of descending similarity, equal ones in that of the two sets' fingerprints, each unless
// its two clusters have more than max_cluster members together. The fingerprints are distinct, so that the result
// depends on the sets alone, not on their numbers.
class CappedLinkage {
 public:
  CappedLinkage(const std::vector<Fingerprint>& prints, int64_t max_cluster);
  CappedLinkage(const CappedLinkage&) = delete;

  // Whether the pair could still be joined: once it cannot, it never can.
  bool open(uint32_t x, uint32_t y) const {
    x = clusters_.find(x);
    y = clusters_.find(y);
    return x != y && size_[x] + size_[y] <= max_cluster_;
  }

  // Pairs that follow all those joined before.
  void join(std::vector<SimilarSets>& pairs);

  bool before(const SimilarSets& a, const SimilarSets& b) const;

  // The number of one set of its cluster, for each set.
  std::vector<uint32_t> clusters() const;

 private:
  const std::vector<Fingerprint>& prints_;
  int64_t max_cluster_;
  std::vector<uint32_t> parent_;
  Forest<uint32_t> clusters_;
  std::vector<int64_t> size_;  // of the roots
};

// Collects pairs for a CappedLinkage within a limit of memory: as many of the first ones as there is room for. The
// caller offers all pairs again and again, those not open any more left out, until join() says that nothing is left.
class FirstPairs {
 public:
  explicit FirstPairs(CappedLinkage& linkage) : linkage_(linkage) {}

  void offer(const SimilarSets& pair);

  // Joins what was collected. False if every pair offered has been.
  bool join();

 private:
  CappedLinkage& linkage_;
  std::vector<SimilarSets> pairs_;
  std::optional<SimilarSets> done_;  // the last pair joined
  std::optional<SimilarSets> cut_;   // the last one kept, where some were not
};

// The connected components of the pairs, as in clusters(); those of more than max_cluster sets (0: no limit) by
// CappedLinkage.
std::vector<uint32_t> linkage_within(std::vector<SimilarSets> pairs, const std::vector<Fingerprint>& prints,
                                     int64_t max_cluster);

}  // namespace fastsft
