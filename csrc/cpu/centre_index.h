// Private to csrc/cpu: the centres of stars by their rarest elements (prefix_filter.h), so that a set finds those it
// may be similar to. Memory follows the centres whose stars have room, not the similar pairs.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "prefix_filter.h"
#include "stars.h"

namespace fastsft {

// Sets by their place in `sets`, which must outlive the index.
class CentreIndex {
 public:
  explicit CentreIndex(const std::vector<const PrefixSet*>& sets) : sets_(sets), seen_by_(sets.size(), kNobody) {}

  void add(uint32_t centre) {
    for (const uint64_t element : sets_[centre]->rarest) centres_[element].push_back(centre);
  }

  // use(centre), once for each with an element in common. Those whose star is full are dropped on the way.
  template <typename Use>
  void each_candidate(uint32_t at, const Stars& stars, const Use& use) {
    for (const uint64_t element : sets_[at]->rarest) {
      const auto found = centres_.find(element);
      if (found == centres_.end()) continue;
      std::vector<uint32_t>& centres = found->second;
      std::erase_if(centres, [&](uint32_t centre) { return !stars.open(centre); });
      for (const uint32_t centre : centres) {
        if (std::exchange(seen_by_[centre], at) != at) use(centre);
      }
    }
  }

 private:
  static constexpr uint32_t kNobody = ~uint32_t{0};

  const std::vector<const PrefixSet*>& sets_;
  std::unordered_map<uint64_t, std::vector<uint32_t>> centres_;
  std::vector<uint32_t> seen_by_;
};

}  // namespace fastsft
