#include "capped_linkage.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

namespace fastsft {
namespace {

constexpr std::size_t kPairsKept = std::size_t{1} << 20;

std::vector<uint32_t> alone(std::size_t count) {
  std::vector<uint32_t> parent(count);
  std::iota(parent.begin(), parent.end(), 0u);
  return parent;
}

}  // namespace

CappedLinkage::CappedLinkage(const std::vector<Fingerprint>& prints, int64_t max_cluster)
    : prints_(prints),
      max_cluster_(max_cluster),
      parent_(alone(prints.size())),
      clusters_{parent_.data()},
      size_(prints.size(), 1) {}

bool CappedLinkage::before(const SimilarSets& a, const SimilarSets& b) const {
  if (a.similarity != b.similarity) return a.similarity > b.similarity;
  const auto lower = [&](const SimilarSets& p) -> const Fingerprint& { return std::min(prints_[p.x], prints_[p.y]); };
  const auto upper = [&](const SimilarSets& p) -> const Fingerprint& { return std::max(prints_[p.x], prints_[p.y]); };
  return std::tie(lower(a), upper(a)) < std::tie(lower(b), upper(b));
}

void CappedLinkage::join(std::vector<SimilarSets>& pairs) {
  std::sort(pairs.begin(), pairs.end(), [&](const SimilarSets& a, const SimilarSets& b) { return before(a, b); });
  for (const SimilarSets& pair : pairs) {
    if (!open(pair.x, pair.y)) continue;
    const int64_t together = size_[clusters_.find(pair.x)] + size_[clusters_.find(pair.y)];
    clusters_.join(pair.x, pair.y);
    size_[clusters_.find(pair.x)] = together;
  }
}

std::vector<uint32_t> CappedLinkage::clusters() const {
  std::vector<uint32_t> cluster(parent_.size());
  for (uint32_t i = 0; i < cluster.size(); ++i) cluster[i] = clusters_.find(i);
  return cluster;
}

void FirstPairs::offer(const SimilarSets& pair) {
  if (done_ && !linkage_.before(*done_, pair)) return;
  if (cut_ && !linkage_.before(pair, *cut_)) return;
  pairs_.push_back(pair);
  if (pairs_.size() < 2 * kPairsKept) return;
  const auto last = pairs_.begin() + (kPairsKept - 1);
  std::nth_element(pairs_.begin(), last, pairs_.end(),
                   [&](const SimilarSets& a, const SimilarSets& b) { return linkage_.before(a, b); });
  cut_ = *last;
  pairs_.resize(kPairsKept);
}

bool FirstPairs::join() {
  const bool more = cut_.has_value();
  linkage_.join(pairs_);
  if (!pairs_.empty()) done_ = pairs_.back();
  pairs_.clear();
  cut_.reset();
  return more;
}

std::vector<uint32_t> linkage_within(std::vector<SimilarSets> pairs, const std::vector<Fingerprint>& prints,
                                     int64_t max_cluster) {
  std::vector<uint32_t> parent = alone(prints.size());
  const Forest<uint32_t> components{parent.data()};
  for (const SimilarSets& pair : pairs) components.join(pair.x, pair.y);
  std::vector<int64_t> size(prints.size());
  for (uint32_t i = 0; i < parent.size(); ++i) ++size[parent[i] = components.find(i)];
  if (max_cluster == 0) return parent;
  std::erase_if(pairs, [&](const SimilarSets& pair) { return size[parent[pair.x]] <= max_cluster; });
  CappedLinkage linkage(prints, max_cluster);
  linkage.join(pairs);
  const std::vector<uint32_t> capped = linkage.clusters();
  for (uint32_t i = 0; i < parent.size(); ++i) {
    if (size[parent[i]] > max_cluster) parent[i] = capped[i];
  }
  return parent;
}

}  // namespace fastsft
