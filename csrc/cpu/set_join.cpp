#include "set_join.h"

#include <algorithm>
#include <utility>

#include "fastsft/parallel.h"

namespace fastsft {
namespace {

constexpr int64_t kSetsPerTask = 256;
// From about here on a comparison per entry costs less than counting it for all.
constexpr std::ptrdiff_t kLongList = 512;

using Sets = std::vector<const PrefixSet*>;

// Collects the earlier sets that may be similar to a set. One for each task.
class Prober {
 public:
  Prober(const Sets& sets, const PrefixIndex& index, double threshold)
      : sets_(sets), index_(index), threshold_(threshold), common_(sets.size()) {}

  // use(candidate) for each of them, by place.
  template <typename Use>
  void each_candidate(uint32_t at, const Use& use) {
    count_common_rarest(at, [&](const PrefixIndex::Entry* e) { return e->at >= at ? index_.end() : e; });
    use_candidates(use);
  }

  // The same without those that `components` connects to the set. The index is grouped.
  template <typename Use>
  void each_unconnected(uint32_t at, const Forest<uint32_t>& components, const Use& use) {
    const uint32_t mine = components.find(sets_[at]->id);
    count_common_rarest(at, [&](const PrefixIndex::Entry* e) {
      const uint64_t element = e->element;
      while (e != index_.end() && e->element == element) {
        const uint32_t root = index_.root(*e);
        if (root >= at) return index_.end();
        if (e->at < at && components.find(sets_[root]->id) != mine) return e;
        e = index_.next_component(e);
      }
      return index_.end();
    });
    use_candidates(use);
  }

 private:
  static constexpr int32_t kPruned = -1;

  // Counts for each set with one of the rarest elements of this one how many; next(entry): the first from the entry on
  // that counts, or the index's end.
  template <typename Next>
  void count_common_rarest(uint32_t at, const Next& next) {
    const PrefixSet& x = *sets_[at];
    const int64_t least_size = least_common_with_any(x.size, threshold_);
    for (uint32_t i = 0; i < x.rarest.size(); ++i) {
      const uint64_t element = x.rarest[i];
      const PrefixIndex::Entry* e = index_.find(element);
      if (e == nullptr) continue;
      while (e != index_.end() && e->element == element) {
        e = next(e);
        if (e != index_.end()) count(x, i, *e++, least_size);
      }
    }
  }

  // The i-th of the rarest elements of x is in the entry's set too.
  void count(const PrefixSet& x, uint32_t i, const PrefixIndex::Entry& e, int64_t least_size) {
    const PrefixSet& y = *sets_[e.at];
    if (y.size < least_size) return;
    int32_t& common = common_[e.at];
    if (common == 0) candidates_.push_back(e.at);
    if (common == kPruned) return;
    ++common;
    // common[...] counts the elements up to here: at most the shorter rest can follow.
    const int64_t left = std::min<int64_t>(x.size - (x.alone() + i), y.size - e.position);
    if (common - 1 + left < least_common(x.size, y.size, threshold_)) common = kPruned;
  }

  template <typename Use>
  void use_candidates(const Use& use) {
    for (const uint32_t candidate : candidates_) {
      if (std::exchange(common_[candidate], 0) != kPruned) use(candidate);
    }
    candidates_.clear();
  }

  const Sets& sets_;
  const PrefixIndex& index_;
  double threshold_;
  std::vector<int32_t> common_;  // [sets]: 0 between sets
  std::vector<uint32_t> candidates_;
};

Sets by_size(Sets sets) {
  std::stable_sort(sets.begin(), sets.end(), [](const PrefixSet* x, const PrefixSet* y) { return x->size < y->size; });
  return sets;
}

// Few tasks, since each has one counter per set.
int64_t sets_per_task(const Sets& sets) {
  return std::max(kSetsPerTask, static_cast<int64_t>(sets.size()) / (16 * num_threads()) + 1);
}

}  // namespace

SetJoin::SetJoin(Sets sets, double threshold)
    : sets_(by_size(std::move(sets))), threshold_(threshold), index_(sets_, threshold) {}

std::vector<SimilarSets> SetJoin::pairs() const {
  const int64_t n = static_cast<int64_t>(sets_.size()), grain = sets_per_task(sets_);
  std::vector<std::vector<SimilarSets>> found((n + grain - 1) / grain);
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    Prober prober(sets_, index_, threshold_);
    SetComparer comparer;
    for (uint32_t at = static_cast<uint32_t>(begin); at < static_cast<uint32_t>(end); ++at) {
      prober.each_candidate(at, [&](uint32_t candidate) {
        const double similarity = comparer.similarity(view(*sets_[at]), view(*sets_[candidate]), threshold_);
        if (similarity >= 0) found[begin / grain].push_back({similarity, sets_[at]->id, sets_[candidate]->id});
      });
    }
  });
  std::vector<SimilarSets> all;
  for (const auto& some : found) all.insert(all.end(), some.begin(), some.end());
  return all;
}

void SetJoin::connect(const Forest<uint32_t>& components) {
  const std::vector<PrefixIndex::List> lists = index_.lists(kLongList);
  parallel_for(static_cast<int64_t>(lists.size()), 1, [&](int64_t begin, int64_t end) {
    SetComparer comparer;
    for (int64_t i = begin; i < end; ++i) {
      for (const PrefixIndex::Entry* e = lists[i].first + 1; e != lists[i].second; ++e) {
        const SetView x = view(*sets_[e[0].at]), y = view(*sets_[e[-1].at]);
        if (components.find(x.id) == components.find(y.id)) continue;
        if (comparer.similarity(x, y, threshold_) >= 0) components.join(x.id, y.id);
      }
    }
  });
  index_.group(roots(components));
  parallel_for(static_cast<int64_t>(sets_.size()), sets_per_task(sets_), [&](int64_t begin, int64_t end) {
    Prober prober(sets_, index_, threshold_);
    SetComparer comparer;
    for (uint32_t at = static_cast<uint32_t>(begin); at < static_cast<uint32_t>(end); ++at) {
      const SetView x = view(*sets_[at]);
      prober.each_unconnected(at, components, [&](uint32_t candidate) {
        const SetView y = view(*sets_[candidate]);
        if (components.find(x.id) == components.find(y.id)) return;
        if (comparer.similarity(x, y, threshold_) >= 0) components.join(x.id, y.id);
      });
    }
  });
}

// For each set the first place of its component.
std::vector<uint32_t> SetJoin::roots(const Forest<uint32_t>& components) const {
  std::vector<std::pair<uint32_t, uint32_t>> places;  // root's id, place
  for (uint32_t at = 0; at < sets_.size(); ++at) places.emplace_back(components.find(sets_[at]->id), at);
  std::sort(places.begin(), places.end());
  std::vector<uint32_t> first(sets_.size());
  for (std::size_t i = 0; i < places.size(); ++i) {
    const bool same = i > 0 && places[i].first == places[i - 1].first;
    first[places[i].second] = same ? first[places[i - 1].second] : places[i].second;
  }
  return first;
}

}  // namespace fastsft
