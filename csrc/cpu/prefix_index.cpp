#include "prefix_index.h"

#include <bit>

#include "fastsft/parallel.h"

namespace fastsft {

PrefixIndex::PrefixIndex(const std::vector<const PrefixSet*>& sets, double threshold) {
  for (uint32_t at = 0; at < sets.size(); ++at) {
    const PrefixSet& set = *sets[at];
    const int64_t prefix = set.size - least_common(set.size, set.size, threshold) + 1;
    for (uint32_t i = 0; i < set.rarest.size() && set.alone() + i < prefix; ++i) {
      entries_.push_back({set.rarest[i], at, set.alone() + i});
    }
  }
  std::sort(entries_.begin(), entries_.end(), [](const Entry& x, const Entry& y) {
    return x.element != y.element ? x.element < y.element : x.at < y.at;
  });
  bits_ = std::bit_width(2 * entries_.size() + 1);
  table_.resize(std::size_t{1} << bits_);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (i > 0 && entries_[i].element == entries_[i - 1].element) continue;
    std::size_t place = first_place(entries_[i].element);
    while (table_[place] != 0) place = (place + 1) & (table_.size() - 1);
    table_[place] = i + 1;
  }
}

std::vector<PrefixIndex::List> PrefixIndex::lists(std::ptrdiff_t least_entries) {
  std::vector<List> found;
  Entry* const last = entries_.data() + entries_.size();
  for (Entry *begin = entries_.data(), *end = begin; begin != last; begin = end) {
    end = std::find_if(begin, last, [&](const Entry& e) { return e.element != begin->element; });
    if (end - begin >= least_entries) found.emplace_back(begin, end);
  }
  return found;
}

void PrefixIndex::group(std::vector<uint32_t> root) {
  root_ = std::move(root);
  const std::vector<List> several = lists(2);
  parallel_for(static_cast<int64_t>(several.size()), 1024, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      std::sort(several[i].first, several[i].second, [&](const Entry& x, const Entry& y) {
        return root_[x.at] != root_[y.at] ? root_[x.at] < root_[y.at] : x.at < y.at;
      });
    }
  });
}

}  // namespace fastsft
