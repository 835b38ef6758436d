#include "component_linker.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "fastsft/parallel.h"
#include "set_join.h"
#include "text_sets.h"

namespace fastsft {
namespace {

// Up to here comparing all pairs takes no longer than a join.
constexpr std::size_t kSmallBucket = 64;
// From here on all sets together have cost more than the index would.
constexpr int64_t kFailuresPerSet = 4;
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
constexpr int64_t kBucketsPerTask = 64;
constexpr std::size_t kBytesReadAtOnce = std::size_t{1} << 23;  // their shingles take up to eight times as much

std::span<const int64_t> members(const LinkJob& job, int64_t bucket) {
  const int64_t* offsets = job.buckets.offsets + bucket;
  return {job.buckets.members + offsets[0], job.buckets.members + offsets[1]};
}

bool connected(const LinkJob& job, int64_t bucket) {
  const auto texts = members(job, bucket);
  const auto root = [&](int64_t text) { return job.links.find(static_cast<uint32_t>(text)); };
  const uint32_t first = root(texts[0]);
  return std::all_of(texts.begin(), texts.end(), [&](int64_t text) { return root(text) == first; });
}

void sort_and_drop_repeated(std::vector<uint32_t>& rows) {
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
}

void append(std::span<const int64_t> texts, std::vector<uint32_t>& to) {
  for (const int64_t text : texts) to.push_back(static_cast<uint32_t>(text));
}

}  // namespace

void ComponentLinker::run(const LinkJob& job, std::span<const int64_t> buckets) { link(job, buckets, false); }

void ComponentLinker::run_with_all_threads(const LinkJob& job, std::span<const int64_t> buckets) {
  link(job, buckets, true);
}

void ComponentLinker::release_if_large() {
  constexpr std::size_t kKept = std::size_t{1} << 20;
  if (pool_.large() || std::max({owners_.capacity(), sets_.capacity(), texts_.capacity()}) > kKept) {
    *this = ComponentLinker();
  }
}

void ComponentLinker::link(const LinkJob& job, std::span<const int64_t> buckets, bool all_threads) {
  pool_.clear();
  owners_.clear();
  if (job.options.verify && job.options.threshold > 0) {
    if (all_threads) read_all(job, buckets);
    const std::vector<int64_t> small = join_large(job, buckets);
    if (all_threads) {
      parallel_for(std::ssize(small), kBucketsPerTask, [&](int64_t begin, int64_t end) {
        SetComparer comparer;
        std::vector<uint32_t> sets;
        int64_t failures = kNoLimit;
        for (int64_t i = begin; i < end; ++i) compare_all(job, small[i], comparer, sets, failures);
      });
    } else {
      int64_t failures = kNoLimit;
      for (const int64_t b : small) compare_all(job, b, pool_.comparer(), sets_, failures);
    }
  } else {
    for (const int64_t b : buckets) {
      const auto texts = members(job, b);
      for (const int64_t text : texts) job.links.join(static_cast<uint32_t>(texts[0]), static_cast<uint32_t>(text));
    }
  }
  if (job.options.max_cluster > 0) cap(job, buckets);
}

void ComponentLinker::own(const LinkJob& job, uint32_t text, uint32_t set) {
  job.set_of[text] = set;
  if (set == owners_.size()) owners_.push_back(text);
  job.links.join(owners_[set], text);
}

void ComponentLinker::read(const LinkJob& job, uint32_t text) {
  if (job.set_of[text] == kNoSet) own(job, text, pool_.add(job.texts[text], job.options.shingles));
}

void ComponentLinker::read_all(const LinkJob& job, std::span<const int64_t> buckets) {
  texts_.clear();
  for (const int64_t b : buckets) {
    if (!connected(job, b)) append(members(job, b), texts_);
  }
  sort_and_drop_repeated(texts_);
  std::vector<std::string_view> part;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < texts_.size(); ++i) {
    part.push_back(job.texts[texts_[i]]);
    bytes += part.back().size();
    if (bytes < kBytesReadAtOnce && i + 1 < texts_.size()) continue;
    const TextSets sets(part, job.options.shingles);
    for (std::size_t j = 0; j < part.size(); ++j) {
      own(job, texts_[i + 1 - part.size() + j], pool_.add(sets.print(j), sets.elements(j)));
    }
    part.clear();
    bytes = 0;
  }
}

// Reads the bucket's texts where that is not done yet.
void ComponentLinker::distinct_sets(const LinkJob& job, int64_t bucket, std::vector<uint32_t>& sets) {
  sets.clear();
  for (const int64_t text : members(job, bucket)) {
    read(job, static_cast<uint32_t>(text));
    sets.push_back(job.set_of[text]);
  }
  sort_and_drop_repeated(sets);
}

// Returns the buckets that are left: those with few sets.
std::vector<int64_t> ComponentLinker::join_large(const LinkJob& job, std::span<const int64_t> buckets) {
  std::vector<int64_t> small, large;
  for (const int64_t b : buckets) {
    if (members(job, b).size() <= kSmallBucket) {
      small.push_back(b);
    } else if (!connected(job, b)) {
      distinct_sets(job, b, sets_);
      (sets_.size() <= kSmallBucket ? small : large).push_back(b);
    }
  }
  // Where sets are similar, one comparison connects two; where they are not, an index is built before long.
  int64_t failures = kFailuresPerSet * pool_.size();
  auto b = large.begin();
  while (b != large.end() && compare_all(job, *b, pool_.comparer(), sets_, failures)) ++b;
  if (b == large.end()) return small;
  std::vector<Shingles> elements;
  for (uint32_t set = 0; set < pool_.size(); ++set) elements.push_back(pool_[set].elements);
  const std::vector<PrefixSet> filtered = filter_by_prefix(elements, owners_, job.options.threshold);
  std::vector<const PrefixSet*> of_set(pool_.size(), nullptr);
  for (const PrefixSet& set : filtered) of_set[job.set_of[set.id]] = &set;
  for (; b != large.end(); ++b) {
    if (connected(job, *b)) continue;
    distinct_sets(job, *b, sets_);
    std::vector<const PrefixSet*> some;
    for (const uint32_t set : sets_) {
      if (of_set[set] != nullptr) some.push_back(of_set[set]);
    }
    SetJoin(std::move(some), job.options.threshold).connect(job.links);
  }
  return small;
}

// False if it gave up.
bool ComponentLinker::compare_all(const LinkJob& job, int64_t bucket, SetComparer& comparer,
                                  std::vector<uint32_t>& sets, int64_t& failures) {
  if (connected(job, bucket)) return true;
  distinct_sets(job, bucket, sets);
  for (uint32_t& set : sets) set = owners_[set];
  return join_similar(sets, job.links, failures, [&](uint32_t x, uint32_t y) {
    return comparer.similarity(pool_[job.set_of[y]], pool_[job.set_of[x]], job.options.threshold) >= 0;
  });
}

// Makes the clusters of more than max_cluster sets anew, as stars.
void ComponentLinker::cap(const LinkJob& job, std::span<const int64_t> buckets) {
  texts_.clear();
  for (const int64_t b : buckets) append(members(job, b), texts_);
  sort_and_drop_repeated(texts_);
  const std::size_t limit = static_cast<std::size_t>(job.options.max_cluster);
  if (texts_.size() <= limit) return;
  for (const uint32_t text : texts_) read(job, text);
  std::vector<uint32_t> root(pool_.size());
  std::vector<uint32_t> roots;
  for (uint32_t set = 0; set < pool_.size(); ++set) roots.push_back(root[set] = job.links.find(owners_[set]));
  std::sort(roots.begin(), roots.end());
  const auto too_large = [&](uint32_t set) {
    const auto [from, to] = std::equal_range(roots.begin(), roots.end(), root[set]);
    return static_cast<std::size_t>(to - from) > limit;
  };
  std::vector<uint32_t> order;
  for (uint32_t set = 0; set < pool_.size(); ++set) {
    if (too_large(set)) order.push_back(set);
  }
  if (order.empty()) return;
  sort_for_stars(order, [&](uint32_t set) { return pool_.print(set); });
  std::vector<uint32_t> place(pool_.size(), kNoSet);
  for (uint32_t at = 0; at < order.size(); ++at) place[order[at]] = at;
  const Stars stars = make_stars(job, buckets, order, place);
  const auto mine = [&](uint32_t text) { return place[job.set_of[text]]; };
  for (const uint32_t text : texts_) {
    if (mine(text) != kNoSet) job.links.parent[text] = text;
  }
  for (const uint32_t text : texts_) {
    if (mine(text) != kNoSet) job.links.join(owners_[order[stars.centre(mine(text))]], text);
  }
}

// Stars of the sets `order`, whose places in it are `place`. A set is compared with the open centres of its buckets.
Stars ComponentLinker::make_stars(const LinkJob& job, std::span<const int64_t> buckets,
                                  const std::vector<uint32_t>& order, const std::vector<uint32_t>& place) {
  const double threshold = job.options.verify ? job.options.threshold : 0.0;
  std::vector<std::vector<uint32_t>> buckets_of(order.size());
  for (uint32_t bucket = 0; bucket < buckets.size(); ++bucket) {
    for (const int64_t text : members(job, buckets[bucket])) {
      const uint32_t at = place[job.set_of[text]];
      if (at != kNoSet && (buckets_of[at].empty() || buckets_of[at].back() != bucket)) {
        buckets_of[at].push_back(bucket);
      }
    }
  }
  Stars stars(order.size(), job.options.max_cluster);
  std::vector<std::vector<uint32_t>> centres(buckets.size());  // of each bucket, closed ones left out
  std::vector<uint32_t> compared_with(order.size(), kNoSet);
  for (uint32_t at = 0; at < order.size(); ++at) {
    Stars::Choice choice;
    for (const uint32_t bucket : buckets_of[at]) {
      std::erase_if(centres[bucket], [&](uint32_t centre) { return !stars.open(centre); });
      for (const uint32_t centre : centres[bucket]) {
        if (std::exchange(compared_with[centre], at) == at) continue;
        const double needed = std::max(threshold, choice.similarity());
        if (const double s = pool_.comparer().similarity(pool_[order[at]], pool_[order[centre]], needed); s >= 0)
          choice.offer(centre, s);
      }
    }
    if (!stars.place(at, choice)) continue;
    for (const uint32_t bucket : buckets_of[at]) centres[bucket].push_back(at);
  }
  return stars;
}

}  // namespace fastsft
