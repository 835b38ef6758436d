// From pairs of sets to pairs of texts, and to clusters. Texts with equal sets are pairs of similarity 1.
#include "fastsft/all_pairs.h"

#include <algorithm>
#include <numeric>

#include "centre_index.h"
#include "fastsft/common.h"
#include "forest.h"
#include "prefix_filter.h"
#include "set_join.h"
#include "stars.h"
#include "text_sets.h"

namespace fastsft {
namespace {

void check(const char* op, const std::string_view* texts, int64_t n, double threshold, int64_t ngram) {
  FASTSFT_CHECK(threshold > 0.0 && threshold <= 1.0, op, ": threshold: expected a number in (0, 1], got ", threshold);
  FASTSFT_CHECK(ngram >= 1, op, ": ngram: expected >= 1, got ", ngram);
  FASTSFT_CHECK(n < 0xFFFFFFFF, op, ": texts: expected fewer than 2^32 - 1, got ", n);
  check_lengths(op, texts, n);
}

std::vector<PrefixSet> filter(const DistinctSets& sets, double threshold) {
  std::vector<uint32_t> numbers(sets.elements.size());
  std::iota(numbers.begin(), numbers.end(), 0u);
  return filter_by_prefix(sets.elements, numbers, threshold);
}

std::vector<const PrefixSet*> pointers(const std::vector<PrefixSet>& sets) {
  std::vector<const PrefixSet*> to;
  for (const PrefixSet& set : sets) to.push_back(&set);
  return to;
}

// The sets in stars: for each the set that is its centre goes to `cluster`.
void make_stars(const std::vector<const PrefixSet*>& sets, double threshold, int64_t limit,
                std::vector<uint32_t>& cluster) {
  Stars stars(sets.size(), limit);
  CentreIndex centres(sets);
  SetComparer comparer;
  for (uint32_t at = 0; at < sets.size(); ++at) {
    Stars::Choice choice;
    centres.each_candidate(at, stars, [&](uint32_t centre) {
      const double needed = std::max(threshold, choice.similarity());
      const double similarity = comparer.similarity(view(*sets[at]), view(*sets[centre]), needed);
      if (similarity >= 0) choice.offer(centre, similarity);
    });
    if (stars.place(at, choice)) centres.add(at);
    cluster[sets[at]->id] = sets[stars.centre(at)]->id;
  }
}

// For each set the number of one set of its cluster: of its component, or, where that has more than `limit` sets (0: no
// limit), of its star.
std::vector<uint32_t> clusters(const DistinctSets& sets, double threshold, int64_t limit) {
  const std::vector<PrefixSet> filtered = filter(sets, threshold);
  std::vector<uint32_t> cluster(sets.elements.size());
  std::iota(cluster.begin(), cluster.end(), 0u);
  const Forest<uint32_t> components{cluster.data()};
  SetJoin(pointers(filtered), threshold).connect(components);
  std::vector<int64_t> size(cluster.size());
  for (uint32_t set = 0; set < cluster.size(); ++set) ++size[cluster[set] = components.find(set)];
  if (limit == 0) return cluster;
  std::vector<const PrefixSet*> large = pointers(filtered);
  std::erase_if(large, [&](const PrefixSet* set) { return size[cluster[set->id]] <= limit; });
  sort_for_stars(large, [&](const PrefixSet* set) { return sets.prints[set->id]; });
  make_stars(large, threshold, limit, cluster);
  return cluster;
}

}  // namespace

std::vector<SimilarPair> similar_pairs(const std::string_view* texts, int64_t n, double threshold,
                                       const ShingleOptions& shingles) {
  check("similar_pairs", texts, n, threshold, shingles.ngram);
  const DistinctSets sets({texts, static_cast<std::size_t>(n)}, shingles);
  std::vector<std::vector<int64_t>> texts_of(sets.elements.size());
  for (int64_t i = 0; i < n; ++i) texts_of[sets.set_of[i]].push_back(i);
  std::vector<SimilarPair> pairs;
  for (const auto& same : texts_of) {
    for (std::size_t i = 0; i < same.size(); ++i) {
      for (std::size_t j = i + 1; j < same.size(); ++j) pairs.push_back({same[i], same[j], 1.0});
    }
  }
  const std::vector<PrefixSet> filtered = filter(sets, threshold);
  for (const SimilarSets& found : SetJoin(pointers(filtered), threshold).pairs()) {
    for (const int64_t x : texts_of[found.x]) {
      for (const int64_t y : texts_of[found.y]) pairs.push_back({std::min(x, y), std::max(x, y), found.similarity});
    }
  }
  std::sort(pairs.begin(), pairs.end(),
            [](const SimilarPair& a, const SimilarPair& b) { return a.x != b.x ? a.x < b.x : a.y < b.y; });
  return pairs;
}

void all_pairs_clusters(const std::string_view* texts, int64_t n, const LinkOptions& options, int64_t* labels) {
  check("near_duplicates", texts, n, options.threshold, options.shingles.ngram);
  FASTSFT_CHECK(options.max_cluster >= 0, "near_duplicates: max_cluster: expected >= 1, got ", options.max_cluster);
  const DistinctSets sets({texts, static_cast<std::size_t>(n)}, options.shingles);
  const std::vector<uint32_t> cluster = clusters(sets, options.threshold, options.max_cluster);
  std::vector<int64_t> first(sets.elements.size(), -1);
  for (int64_t i = 0; i < n; ++i) {
    int64_t& label = first[cluster[sets.set_of[i]]];
    if (label < 0) label = i;
    labels[i] = label;
  }
}

}  // namespace fastsft
