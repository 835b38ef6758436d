#include "capped_linkage.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "forest.h"

namespace fastsft {

std::vector<uint32_t> capped_linkage(std::vector<SimilarSets> pairs, const std::vector<Fingerprint>& prints,
                                     int64_t max_cluster) {
  for (SimilarSets& pair : pairs) {
    if (prints[pair.y] < prints[pair.x]) std::swap(pair.x, pair.y);
  }
  std::sort(pairs.begin(), pairs.end(), [&](const SimilarSets& a, const SimilarSets& b) {
    if (a.similarity != b.similarity) return a.similarity > b.similarity;
    return std::tie(prints[a.x], prints[a.y]) < std::tie(prints[b.x], prints[b.y]);
  });
  std::vector<uint32_t> parent(prints.size());
  std::iota(parent.begin(), parent.end(), 0u);
  const Forest<uint32_t> clusters{parent.data()};
  std::vector<int64_t> size(prints.size(), 1);
  for (const SimilarSets& pair : pairs) {
    const uint32_t x = clusters.find(pair.x), y = clusters.find(pair.y);
    if (x == y || size[x] + size[y] > max_cluster) continue;
    clusters.join(x, y);
    size[clusters.find(x)] = size[x] + size[y];
  }
  for (uint32_t i = 0; i < parent.size(); ++i) parent[i] = clusters.find(i);
  return parent;
}

std::vector<uint32_t> linkage_within(std::vector<SimilarSets> pairs, const std::vector<Fingerprint>& prints,
                                     int64_t max_cluster) {
  std::vector<uint32_t> parent(prints.size());
  std::iota(parent.begin(), parent.end(), 0u);
  const Forest<uint32_t> components{parent.data()};
  for (const SimilarSets& pair : pairs) components.join(pair.x, pair.y);
  std::vector<int64_t> size(prints.size());
  for (uint32_t i = 0; i < parent.size(); ++i) ++size[parent[i] = components.find(i)];
  if (max_cluster == 0) return parent;
  std::erase_if(pairs, [&](const SimilarSets& pair) { return size[parent[pair.x]] <= max_cluster; });
  const std::vector<uint32_t> capped = capped_linkage(std::move(pairs), prints, max_cluster);
  for (uint32_t i = 0; i < parent.size(); ++i) {
    if (size[parent[i]] > max_cluster) parent[i] = capped[i];
  }
  return parent;
}

}  // namespace fastsft
