// From pairs of sets to pairs of texts, and to clusters. Texts with equal sets are pairs of similarity 1.
#include "fastsft/all_pairs.h"

#include <algorithm>
#include <numeric>

#include "fastsft/common.h"
#include "forest.h"
#include "similarity_join.h"
#include "stars.h"

namespace fastsft {
namespace {

void check(const char* op, const std::string_view* texts, int64_t n, double threshold, int64_t ngram) {
  FASTSFT_CHECK(threshold > 0.0 && threshold <= 1.0, op, ": threshold: expected a number in (0, 1], got ", threshold);
  FASTSFT_CHECK(ngram >= 1, op, ": ngram: expected >= 1, got ", ngram);
  FASTSFT_CHECK(n < 0xFFFFFFFF, op, ": texts: expected fewer than 2^32 - 1, got ", n);
  check_lengths(op, texts, n);
}

// The sets of `order` in stars: for each the set that is its centre goes to `cluster`.
void make_stars(std::vector<SimilarSets>& pairs, const std::vector<uint32_t>& order, int64_t limit,
                std::vector<uint32_t>& cluster) {
  std::vector<uint32_t> place(cluster.size());
  for (uint32_t at = 0; at < order.size(); ++at) place[order[at]] = at;
  for (SimilarSets& pair : pairs) {  // from here on places, the later one first
    const auto [earlier, later] = std::minmax({place[pair.x], place[pair.y]});
    pair.x = later;
    pair.y = earlier;
  }
  std::sort(pairs.begin(), pairs.end(), [](const SimilarSets& a, const SimilarSets& b) { return a.x < b.x; });
  Stars stars(order.size(), limit);
  auto pair = pairs.begin();
  for (uint32_t at = 0; at < order.size(); ++at) {
    Stars::Choice choice;
    for (; pair != pairs.end() && pair->x == at; ++pair) {
      if (stars.open(pair->y)) choice.offer(pair->y, pair->similarity);
    }
    stars.place(at, choice);
    cluster[order[at]] = order[stars.centre(at)];
  }
}

// For each set the number of one set of its cluster: of its component, or, where that has more than `limit` sets (0: no
// limit), of its star.
std::vector<uint32_t> clusters(SimilarityJoin& join, int64_t limit) {
  std::vector<uint32_t> cluster(join.prints.size());
  std::iota(cluster.begin(), cluster.end(), 0u);
  const Forest<uint32_t> components{cluster.data()};
  for (const SimilarSets& pair : join.pairs) components.join(pair.x, pair.y);
  std::vector<int64_t> size(cluster.size());
  for (uint32_t set = 0; set < cluster.size(); ++set) ++size[cluster[set] = components.find(set)];
  if (limit == 0) return cluster;
  const auto large = [&](uint32_t set) { return size[cluster[set]] > limit; };
  std::vector<uint32_t> order;
  for (uint32_t set = 0; set < cluster.size(); ++set) {
    if (large(set)) order.push_back(set);
  }
  std::erase_if(join.pairs, [&](const SimilarSets& pair) { return !large(pair.x); });
  sort_for_stars(order, [&](uint32_t set) { return join.prints[set]; });
  make_stars(join.pairs, order, limit, cluster);
  return cluster;
}

}  // namespace

std::vector<SimilarPair> similar_pairs(const std::string_view* texts, int64_t n, double threshold,
                                       const ShingleOptions& shingles) {
  check("similar_pairs", texts, n, threshold, shingles.ngram);
  const SimilarityJoin join = join_all_pairs(texts, n, threshold, shingles, 0);
  std::vector<std::vector<int64_t>> texts_of(join.prints.size());
  for (int64_t i = 0; i < n; ++i) texts_of[join.set_of[i]].push_back(i);
  std::vector<SimilarPair> pairs;
  for (const auto& same : texts_of) {
    for (std::size_t i = 0; i < same.size(); ++i) {
      for (std::size_t j = i + 1; j < same.size(); ++j) pairs.push_back({same[i], same[j], 1.0});
    }
  }
  for (const SimilarSets& sets : join.pairs) {
    for (const int64_t x : texts_of[sets.x]) {
      for (const int64_t y : texts_of[sets.y]) pairs.push_back({std::min(x, y), std::max(x, y), sets.similarity});
    }
  }
  std::sort(pairs.begin(), pairs.end(),
            [](const SimilarPair& a, const SimilarPair& b) { return a.x != b.x ? a.x < b.x : a.y < b.y; });
  return pairs;
}

void all_pairs_clusters(const std::string_view* texts, int64_t n, const LinkOptions& options, int64_t* labels) {
  check("near_duplicates", texts, n, options.threshold, options.shingles.ngram);
  FASTSFT_CHECK(options.max_cluster >= 0, "near_duplicates: max_cluster: expected >= 1, got ", options.max_cluster);
  const int64_t whole_above = options.max_cluster == 0 ? n : options.max_cluster;
  SimilarityJoin join = join_all_pairs(texts, n, options.threshold, options.shingles, whole_above);
  const std::vector<uint32_t> cluster = clusters(join, options.max_cluster);
  std::vector<int64_t> first(join.prints.size(), -1);
  for (int64_t i = 0; i < n; ++i) {
    int64_t& label = first[cluster[join.set_of[i]]];
    if (label < 0) label = i;
    labels[i] = label;
  }
}

}  // namespace fastsft
