// Private to csrc/cpu: where the rarest elements of some sets occur.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "prefix_filter.h"

namespace fastsft {

// Sets are numbered by their place in ascending order of size, and so is a pair (y, x): |y| <= |x|. Then x and y have
// at least ceil(2 t / (1 + t) |y|) elements in common, so that the first |y| - ceil(2 t / (1 + t) |y|) + 1 of y are
// enough here, where the prefix of x (prefix_filter.h) is looked up.
class PrefixIndex {
 public:
  struct Entry {
    uint64_t element;
    uint32_t at;
    uint32_t position;  // of the element in its set
  };
  using List = std::pair<Entry*, Entry*>;  // the entries of one element

  PrefixIndex(const std::vector<const PrefixSet*>& sets, double threshold);

  // The first entry of the element, null if there is none; others follow up to end().
  const Entry* find(uint64_t element) const {
    for (std::size_t place = first_place(element); table_[place] != 0; place = (place + 1) & (table_.size() - 1)) {
      const Entry* entry = &entries_[table_[place] - 1];
      if (entry->element == element) return entry;
    }
    return nullptr;
  }
  const Entry* end() const { return entries_.data() + entries_.size(); }

  // Those of at least so many entries.
  std::vector<List> lists(std::ptrdiff_t least_entries);

  // Puts the sets of one component together in each list, components by their first set. root [sets]: its place.
  void group(std::vector<uint32_t> root);
  uint32_t root(const Entry& entry) const { return root_[entry.at]; }

  // The first entry behind those of the same element and component.
  const Entry* next_component(const Entry* entry) const {
    const auto same = [&](const Entry& e) { return e.element == entry->element && root(e) == root(*entry); };
    std::ptrdiff_t step = 1;
    while (step < end() - entry && same(entry[step])) step *= 2;
    return std::partition_point(entry + step / 2, entry + std::min(step, end() - entry), same);
  }

 private:
  std::size_t first_place(uint64_t element) const { return (element * 0x9E3779B97F4A7C15u) >> (64 - bits_); }

  std::vector<Entry> entries_;
  std::vector<uint32_t> root_;  // [sets], once grouped
  int bits_ = 0;
  std::vector<std::size_t> table_;  // entry + 1, or 0
};

}  // namespace fastsft
