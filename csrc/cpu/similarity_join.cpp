// Per shingle: the shingler's pass, one insertion into a small table, one increment and one look-up in a table of
// counts (a cache miss each, prefetched). Sets that have too few shingles in common with any other one, nearly all in a
// corpus with few duplicates, end there. The rest sorts its rarest shingles, looks those up in an index of them, and
// counts what it has in common with the sets found.
//
// Sets are taken in order of ascending size, and so is a pair (y, x): |y| <= |x|. With shingles in one order for all
// sets, rarest first, J(x, y) >= t means at least ceil(t |x|) common ones, and at least ceil(2 t / (1 + t) |y|), so
// that the first |x| - ceil(t |x|) + 1 of x and the first |y| - ceil(2 t / (1 + t) |y|) + 1 of y have one in common.
//
// Where only components are wanted, n similar sets have n^2 / 2 pairs, of which n - 1 are enough. Neighbours in the
// long lists of the index are compared first. What that connects stands together in each list, so that a set steps over
// all that it is connected to.
#include "similarity_join.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <numeric>
#include <utility>

#include "fastsft/common.h"
#include "fastsft/parallel.h"
#include "forest.h"

namespace fastsft {
namespace {

using Set = uint32_t;

constexpr int64_t kTextsPerTask = 256;
constexpr int64_t kSetsPerTask = 64;
constexpr std::size_t kAhead = 16;
constexpr std::ptrdiff_t kLongList =
    512;  // from about here on a comparison per entry costs less than counting it for all

// The sets of all texts, in pieces of kTextsPerTask texts.
struct Pieces {
  struct Piece {
    std::vector<uint64_t> elements;
    std::vector<int64_t> begins;
    std::vector<Fingerprint> prints;
  };
  std::vector<Piece> pieces;

  Pieces(const std::string_view* texts, int64_t n, const ShingleOptions& options) {
    pieces.resize((n + kTextsPerTask - 1) / kTextsPerTask);
    parallel_for(n, kTextsPerTask, [&](int64_t begin, int64_t end) {
      static thread_local Shingler<uint64_t> shingler;
      static thread_local ShingleTable table;
      Piece& piece = pieces[begin / kTextsPerTask];
      for (int64_t i = begin; i < end; ++i) {
        piece.begins.push_back(static_cast<int64_t>(piece.elements.size()));
        piece.prints.push_back(append_distinct(texts[i], options, shingler, table, piece.elements));
      }
      shingler.release_if_large();
      if (table.large()) table = ShingleTable();
    });
  }

  const Fingerprint& print(int64_t text) const { return pieces[text / kTextsPerTask].prints[text % kTextsPerTask]; }
  Shingles elements(int64_t text) const {
    const Piece& piece = pieces[text / kTextsPerTask];
    const int64_t i = text % kTextsPerTask;
    return Shingles(piece.elements).subspan(static_cast<std::size_t>(piece.begins[i]), piece.prints[i].size);
  }
};

// In how many sets a shingle is: 1 only where that is so, otherwise 2 to 255, more where others fall into its place.
class Counts {
 public:
  explicit Counts(const std::vector<Shingles>& sets) {
    std::size_t total = 0;
    for (const Shingles& set : sets) total += set.size();
    bits_ = std::bit_width(8 * total + 1);
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

  uint8_t operator[](uint64_t shingle) const { return counts_[place(shingle)]; }
  void prefetch(uint64_t shingle) const { __builtin_prefetch(&counts_[place(shingle)]); }

 private:
  std::size_t place(uint64_t shingle) const { return shingle >> (64 - bits_); }

  int bits_ = 0;
  std::vector<uint8_t> counts_;
};

// The least number of common elements with any set that a set of this size needs.
int64_t least_common_with_any(int64_t size, double threshold) {
  int64_t common = std::max<int64_t>(static_cast<int64_t>(threshold * static_cast<double>(size)) - 1, 0);
  while (common < size && jaccard(common, size, common) < threshold) ++common;
  return common;
}

// What is left of a set after the first filter.
struct Kept {
  Set set;
  uint32_t size;                 // of the whole set
  std::vector<uint64_t> shared;  // elements that another set may have
  std::vector<uint64_t> rarest;  // of those, as far as they are in the prefix to look up: (count, hash), ascending
  uint32_t alone() const { return size - static_cast<uint32_t>(shared.size()); }  // elements that precede them
};

// Keeps a set if it has so many elements in other sets as similarity takes.
bool keep(Shingles elements, const Counts& counts, double threshold, Kept& kept) {
  const int64_t size = static_cast<int64_t>(elements.size()), needed = least_common_with_any(size, threshold);
  for (const uint64_t h : elements.first(std::min(kAhead, elements.size()))) counts.prefetch(h);
  std::vector<uint64_t> order;
  for (std::size_t i = 0; i < elements.size(); ++i) {
    if (i + kAhead < elements.size()) counts.prefetch(elements[i + kAhead]);
    const uint8_t count = counts[elements[i]];
    if (count < 2) continue;
    kept.shared.push_back(elements[i]);
    order.push_back(uint64_t{count} << 56 |
                    elements[i] >> 8);  // equal hashes stay equal: a filter may have more of them
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

// Where the rarest elements occur.
class Index {
 public:
  struct Entry {
    uint64_t element;
    uint32_t at;        // in the order of the sets
    uint32_t position;  // of the element in its set
  };

  Index(const std::vector<Kept>& sets, double threshold) {
    for (uint32_t at = 0; at < sets.size(); ++at) {
      const Kept& set = sets[at];
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

  // The first entry of the element, null if there is none; others follow up to end().
  const Entry* find(uint64_t element) const {
    for (std::size_t place = first_place(element); table_[place] != 0; place = (place + 1) & (table_.size() - 1)) {
      const Entry* entry = &entries_[table_[place] - 1];
      if (entry->element == element) return entry;
    }
    return nullptr;
  }
  const Entry* end() const { return entries_.data() + entries_.size(); }

  // use(begin, end) for each element's entries.
  template <typename Use>
  void each_list(const Use& use) {
    for (auto begin = entries_.begin(), end = begin; begin != entries_.end(); begin = end) {
      end = std::find_if(begin, entries_.end(), [&](const Entry& e) { return e.element != begin->element; });
      use(begin, end);
    }
  }

  // Puts the sets of one component together in each list, components by their first set.
  void group(std::vector<uint32_t> root) {
    root_ = std::move(root);
    each_list([&](auto begin, auto end) {
      std::sort(begin, end, [&](const Entry& x, const Entry& y) {
        return root_[x.at] != root_[y.at] ? root_[x.at] < root_[y.at] : x.at < y.at;
      });
    });
  }
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

// Sets connected so far, by their place in the order.
struct Components {
  std::vector<uint32_t> parent;
  Forest<uint32_t> forest;

  explicit Components(std::vector<uint32_t> parents) : parent(std::move(parents)), forest{parent.data()} {}
  explicit Components(std::size_t sets) : parent(sets), forest{parent.data()} {
    std::iota(parent.begin(), parent.end(), 0u);
  }
  Components(const Components&) = delete;

  std::vector<uint32_t> roots() const {
    std::vector<uint32_t> root(parent.size());
    for (uint32_t at = 0; at < root.size(); ++at) root[at] = forest.find(at);
    return root;
  }
};

// Finds the partners that come before one set in the order.
class Prober {
 public:
  Prober(const std::vector<Kept>& sets, const Index& index, double threshold)
      : sets_(sets), index_(index), threshold_(threshold), common_(sets.size()) {}

  // Every one of them.
  void run(uint32_t at, std::vector<SimilarSets>& found) {
    count_common_rarest(at, nullptr);
    for (const uint32_t candidate : candidates_) {
      if (std::exchange(common_[candidate], 0) != kPruned) compare(at, candidate, found);
    }
    candidates_.clear();
  }

  // One of each component that the set is not connected to yet, which it is then. The index is grouped.
  void run(uint32_t at, const Forest<uint32_t>& connected, std::vector<SimilarSets>& found) {
    count_common_rarest(at, &connected);
    for (const uint32_t candidate : candidates_) {
      if (std::exchange(common_[candidate], 0) == kPruned) continue;
      if (connected.find(at) == connected.find(candidate)) continue;
      if (compare(at, candidate, found)) connected.join(at, candidate);
    }
    candidates_.clear();
  }

  bool compare(uint32_t at, uint32_t candidate, std::vector<SimilarSets>& found) {
    const Kept& x = sets_[at];
    const Kept& y = sets_[candidate];
    if (in_table_ != at) fill(at);
    const int64_t needed = least_common(x.size, y.size, threshold_);
    const int64_t common = count_common(table_, Shingles(y.shared), needed);
    if (common < needed) return false;
    found.push_back({jaccard(common, x.size, y.size), x.set, y.set});
    return true;
  }

 private:
  static constexpr int32_t kPruned = -1;

  // Collects candidates_: the earlier sets with which the set has one of its rarest elements in common, but not those
  // that `connected` (null: none) connects to it.
  void count_common_rarest(uint32_t at, const Forest<uint32_t>* connected) {
    const Kept& x = sets_[at];
    const int64_t least_size = least_common_with_any(x.size, threshold_);
    const uint32_t mine = connected == nullptr ? at : connected->find(at);
    for (uint32_t i = 0; i < x.rarest.size(); ++i) {
      const uint64_t element = x.rarest[i];
      const Index::Entry* e = index_.find(element);
      while (e != nullptr && e != index_.end() && e->element == element) {
        if (connected == nullptr) {
          if (e->at >= at) break;
        } else {
          if (index_.root(*e) >= at) break;
          if (e->at >= at || connected->find(index_.root(*e)) == mine) {
            e = index_.next_component(e);
            continue;
          }
        }
        count(x, i, *e++, least_size);
      }
    }
  }

  // The i-th of the rarest elements of x is in the entry's set too.
  void count(const Kept& x, uint32_t i, const Index::Entry& e, int64_t least_size) {
    const Kept& y = sets_[e.at];
    if (y.size < least_size) return;
    int32_t& common = common_[e.at];
    if (common == 0) candidates_.push_back(e.at);
    if (common == kPruned) return;
    ++common;
    // common[...] counts the elements up to here: at most the shorter rest can follow.
    const int64_t left = std::min<int64_t>(x.size - (x.alone() + i), y.size - e.position);
    if (common - 1 + left < least_common(x.size, y.size, threshold_)) common = kPruned;
  }

  void fill(uint32_t at) {
    const Kept& x = sets_[at];
    table_.clear(static_cast<int64_t>(x.shared.size()));
    for (const uint64_t h : x.shared) table_.insert(h);
    in_table_ = at;
  }

  const std::vector<Kept>& sets_;
  const Index& index_;
  double threshold_;
  ShingleTable table_;
  int64_t in_table_ = -1;
  std::vector<int32_t> common_;  // [sets]: 0 between runs
  std::vector<uint32_t> candidates_;
};

// run(prober, begin, end, found) for tasks of successive sets: all that they found.
template <typename Run>
std::vector<SimilarSets> probe(const std::vector<Kept>& sets, const Index& index, double threshold, const Run& run) {
  const int64_t count = static_cast<int64_t>(sets.size());
  // Few tasks, since each has one counter per set.
  const int64_t grain = std::max(kSetsPerTask, count / (16 * num_threads()) + 1);
  std::vector<std::vector<SimilarSets>> found((count + grain - 1) / grain);
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    Prober prober(sets, index, threshold);
    run(prober, static_cast<uint32_t>(begin), static_cast<uint32_t>(end), found[begin / grain]);
  });
  std::vector<SimilarSets> all;
  for (const auto& some : found) all.insert(all.end(), some.begin(), some.end());
  return all;
}

std::vector<SimilarSets> every_pair(const std::vector<Kept>& sets, double threshold) {
  const Index index(sets, threshold);
  return probe(sets, index, threshold, [](Prober& prober, uint32_t begin, uint32_t end, auto& found) {
    for (uint32_t at = begin; at < end; ++at) prober.run(at, found);
  });
}

// Pairs with the same components as every_pair.
std::vector<SimilarSets> connecting_pairs(const std::vector<Kept>& sets, double threshold) {
  Index index(sets, threshold);
  const Components neighbours(sets.size());
  const Forest<uint32_t>& connected = neighbours.forest;
  std::vector<SimilarSets> pairs;
  Prober prober(sets, index, threshold);
  index.each_list([&](auto begin, auto end) {
    if (end - begin < kLongList) return;
    for (auto before = begin, e = begin + 1; e != end; before = e++) {
      if (connected.find(e->at) == connected.find(before->at)) continue;
      if (prober.compare(e->at, before->at, pairs)) connected.join(e->at, before->at);
    }
  });
  index.group(neighbours.roots());
  // Tasks know only what they connect themselves.
  const auto more = probe(sets, index, threshold, [&](Prober& mine, uint32_t begin, uint32_t end, auto& found) {
    const Components components(neighbours.parent);
    for (uint32_t at = begin; at < end; ++at) mine.run(at, components.forest, found);
  });
  pairs.insert(pairs.end(), more.begin(), more.end());
  return pairs;
}

// The number of sets in each one's component.
std::vector<int64_t> component_sizes(const std::vector<SimilarSets>& pairs, std::size_t sets) {
  const Components components(sets);
  for (const SimilarSets& pair : pairs) components.forest.join(pair.x, pair.y);
  const std::vector<uint32_t> root = components.roots();
  std::vector<int64_t> count(sets), size(sets);
  for (const uint32_t r : root) ++count[r];
  for (std::size_t set = 0; set < sets; ++set) size[set] = count[root[set]];
  return size;
}

}  // namespace

SimilarityJoin join_all_pairs(const std::string_view* texts, int64_t n, double threshold, const ShingleOptions& options,
                              int64_t whole_above) {
  const Pieces all(texts, n, options);
  SimilarityJoin join;
  PrintIndex prints;
  std::vector<Shingles> sets;
  for (int64_t i = 0; i < n; ++i) {
    join.set_of.push_back(prints.add(all.print(i)));
    if (join.set_of.back() == sets.size()) sets.push_back(all.elements(i));
  }
  const Counts counts(sets);

  const int64_t num_sets = static_cast<int64_t>(sets.size()), tasks = (num_sets + kSetsPerTask - 1) / kSetsPerTask;
  std::vector<std::vector<Kept>> kept(tasks);
  parallel_for(num_sets, kSetsPerTask, [&](int64_t begin, int64_t end) {
    Kept one;
    for (int64_t set = begin; set < end; ++set) {
      one.set = static_cast<Set>(set);
      if (keep(sets[set], counts, threshold, one)) kept[begin / kSetsPerTask].push_back(std::move(one));
    }
  });
  std::vector<Kept> order;
  for (std::vector<Kept>& some : kept) std::move(some.begin(), some.end(), std::back_inserter(order));
  std::stable_sort(order.begin(), order.end(), [](const Kept& x, const Kept& y) { return x.size < y.size; });

  if (whole_above > 0) {
    join.pairs = connecting_pairs(order, threshold);
    const std::vector<int64_t> size = component_sizes(join.pairs, sets.size());
    std::erase_if(join.pairs, [&](const SimilarSets& pair) { return size[pair.x] > whole_above; });
    std::erase_if(order, [&](const Kept& kept_set) { return size[kept_set.set] <= whole_above; });
  }
  const std::vector<SimilarSets> whole = every_pair(order, threshold);
  join.pairs.insert(join.pairs.end(), whole.begin(), whole.end());
  join.prints = prints.take();
  return join;
}

}  // namespace fastsft
