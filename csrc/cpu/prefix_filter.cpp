#include "prefix_filter.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

#include "fastsft/parallel.h"

namespace fastsft {
namespace {

constexpr int64_t kSetsPerTask = 64;
constexpr std::size_t kAhead = 16;

// In how many sets an element is: 1 only where that is so, otherwise 2 to 255, more where others fall into its place.
class Counts {
 public:
  explicit Counts(std::span<const Shingles> sets) {
    std::size_t total = 0;
    for (const Shingles& set : sets) total += set.size();
    bits_ = std::bit_width(4 * total + 1);
    counts_.resize(std::size_t{1} << bits_);
    // Each task counts one range of places, so that no two write to the same.
    const int tasks = num_threads();
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      const std::size_t low = counts_.size() / tasks * begin;
      const std::size_t high = end == tasks ? counts_.size() : counts_.size() / tasks * end;
      for (const Shingles& set : sets) {
        const auto mine = [&](std::size_t at) { return at >= low && at < high; };
        for (std::size_t i = 0; i < set.size(); ++i) {
          if (i + kAhead < set.size()) {
            if (const std::size_t later = place(set[i + kAhead]); mine(later)) __builtin_prefetch(&counts_[later], 1);
          }
          const std::size_t at = place(set[i]);
          if (mine(at)) counts_[at] = static_cast<uint8_t>(counts_[at] + (counts_[at] < 255));
        }
      }
    });
  }

  uint8_t operator[](uint64_t element) const { return counts_[place(element)]; }
  void prefetch(uint64_t element) const { __builtin_prefetch(&counts_[place(element)]); }

 private:
  std::size_t place(uint64_t element) const { return element >> (64 - bits_); }

  int bits_ = 0;
  std::vector<uint8_t> counts_;
};

// Keeps a set if it has so many elements in other sets as similarity takes.
bool keep(Shingles elements, const Counts& counts, double threshold, PrefixSet& kept) {
  const int64_t size = static_cast<int64_t>(elements.size()), needed = least_common_with_any(size, threshold);
  for (const uint64_t h : elements.first(std::min(kAhead, elements.size()))) counts.prefetch(h);
  std::vector<uint64_t> order;
  for (std::size_t i = 0; i < elements.size(); ++i) {
    if (i + kAhead < elements.size()) counts.prefetch(elements[i + kAhead]);
    const uint8_t count = counts[elements[i]];
    if (count < 2) continue;
    kept.shared.push_back(elements[i]);
    // Equal hashes stay equal: a filter may have more of them.
    order.push_back(uint64_t{count} << 56 | elements[i] >> 8);
  }
  if (static_cast<int64_t>(kept.shared.size()) < needed || size == 0) {
    kept.shared.clear();
    return false;
  }
  const int64_t prefix = size - needed + 1 - (size - static_cast<int64_t>(kept.shared.size()));
  std::nth_element(order.begin(), order.begin() + (prefix - 1), order.end());
  order.resize(static_cast<std::size_t>(prefix));
  std::sort(order.begin(), order.end());
  kept.size = static_cast<uint32_t>(size);
  kept.rarest = std::move(order);
  return true;
}

}  // namespace

std::vector<PrefixSet> filter_by_prefix(std::span<const Shingles> sets, std::span<const uint32_t> ids,
                                        double threshold) {
  const Counts counts(sets);
  const int64_t n = static_cast<int64_t>(sets.size());
  std::vector<std::vector<PrefixSet>> kept((n + kSetsPerTask - 1) / kSetsPerTask);
  parallel_for(n, kSetsPerTask, [&](int64_t begin, int64_t end) {
    PrefixSet one;
    for (int64_t i = begin; i < end; ++i) {
      one.id = ids[i];
      if (keep(sets[i], counts, threshold, one)) kept[begin / kSetsPerTask].push_back(std::move(one));
    }
  });
  std::vector<PrefixSet> all;
  for (std::vector<PrefixSet>& some : kept) std::move(some.begin(), some.end(), std::back_inserter(all));
  return all;
}

}  // namespace fastsft
