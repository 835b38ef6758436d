// Buckets are gathered by connected component of the candidates. Components share nothing, so that each is verified by
// one thread, its sets of shingles in that thread's scratch. Per text of a bucket that is not connected yet: one pass
// of the shingler and one insertion per shingle; per candidate pair not yet connected: at most one probe per shingle.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "fastsft/common.h"
#include "fastsft/duplicates.h"
#include "fastsft/parallel.h"
#include "forest.h"
#include "shingle_sets.h"
#include "stars.h"

namespace fastsft {
namespace {

using Row = uint32_t;

constexpr Row kNone = ~Row{0};
constexpr int64_t kBucketsPerTask = 16;

void check(int64_t n, const Buckets& buckets, const LinkOptions& options) {
  FASTSFT_CHECK(n < kNone, "link_similar: texts: expected fewer than 2^32 - 1, got ", n);
  FASTSFT_CHECK(options.threshold >= 0.0 && options.threshold <= 1.0,
                "link_similar: threshold: expected a number in [0, 1], got ", options.threshold);
  FASTSFT_CHECK(options.shingles.ngram >= 1, "link_similar: ngram: expected >= 1, got ", options.shingles.ngram);
  FASTSFT_CHECK(options.max_cluster >= 0, "link_similar: max_cluster: expected >= 1, got ", options.max_cluster);
  FASTSFT_CHECK(buckets.offsets[0] == 0, "link_similar: offsets: expected 0 first, got ", buckets.offsets[0]);
  for (int64_t b = 0; b < buckets.count; ++b) {
    FASTSFT_CHECK(buckets.offsets[b] <= buckets.offsets[b + 1],
                  "link_similar: offsets: expected never to decrease, got ", buckets.offsets[b], " then ",
                  buckets.offsets[b + 1], " at bucket ", b);
  }
  for (int64_t m = 0; m < buckets.offsets[buckets.count]; ++m) {
    FASTSFT_CHECK(buckets.members[m] >= 0 && buckets.members[m] < n, "link_similar: members[", m,
                  "]: expected a text in [0, ", n, "), got ", buckets.members[m]);
  }
}

// The rows of the texts in the caller's forest.
class Rows {
 public:
  Rows(int64_t n, const int64_t* rows, int64_t* parent, int64_t num_rows)
      : rows_(rows), forest_{parent}, num_rows_(num_rows) {
    FASTSFT_CHECK(rows != nullptr || n <= num_rows, "link_similar: parent: expected one row for each of the ", n,
                  " texts, got ", num_rows);
  }

  // For each text the first one of the same component.
  std::vector<Row> connected(int64_t n, bool none_expected) const {
    std::vector<Row> first(n);
    std::iota(first.begin(), first.end(), Row{0});
    std::vector<std::pair<int64_t, Row>> roots;  // of the texts whose root is another row
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = row(i);
      FASTSFT_CHECK(r >= 0 && r < num_rows_, "link_similar: rows[", i, "]: expected a row in [0, ", num_rows_,
                    "), got ", r);
      roots.emplace_back(checked_root(r), static_cast<Row>(i));
      FASTSFT_CHECK(!none_expected || roots.back().first == r, "link_similar: parent[", r,
                    "]: expected no row to be connected before where max_cluster is given, got ", forest_.parent[r]);
    }
    const auto below = [](const auto& x, const auto& y) { return x < y; };
    if (!std::is_sorted(roots.begin(), roots.end(), below)) std::sort(roots.begin(), roots.end(), below);
    for (int64_t i = 1; i < n; ++i) {
      if (roots[i].first == roots[i - 1].first) first[roots[i].second] = first[roots[i - 1].second];
    }
    return first;
  }

  void join(const Forest<Row>& links, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      if (const Row first = links.find(static_cast<Row>(i)); first != i) forest_.join(row(first), row(i));
    }
  }

 private:
  int64_t row(int64_t i) const { return rows_ == nullptr ? i : rows_[i]; }

  // Leaves the rows on the way with the root for their parent, so that long chains are walked once.
  int64_t checked_root(int64_t r) const {
    int64_t root = r;
    while (forest_.parent[root] != root) {
      const int64_t up = forest_.parent[root];
      FASTSFT_CHECK(up >= 0 && up < root, "link_similar: parent[", root, "]: expected a row in [0, ", root, "], got ",
                    up);
      root = up;
    }
    while (r != root) r = std::exchange(forest_.parent[r], root);
    return root;
  }

  const int64_t* rows_;
  Forest<int64_t> forest_;
  int64_t num_rows_;
};

// The buckets of two or more, by connected component of the candidates: those of component c are
// buckets[offsets[c] .. offsets[c + 1]), the component with most of them first. Task t has the components tasks[t] ..
// tasks[t + 1]: small ones together, a large one alone.
struct Components {
  std::vector<int64_t> buckets;
  std::vector<int64_t> offsets;
  std::vector<int64_t> tasks{0};

  Components(const Buckets& given, const Forest<Row>& candidates, int64_t n) {
    std::vector<Row> number(n, kNone);
    std::vector<std::pair<Row, int64_t>> found;  // component, bucket
    std::vector<int64_t> sizes;
    for (int64_t b = 0; b < given.count; ++b) {
      if (given.offsets[b + 1] - given.offsets[b] < 2) continue;
      Row& mine = number[candidates.find(static_cast<Row>(given.members[given.offsets[b]]))];
      if (mine == kNone) {
        mine = static_cast<Row>(sizes.size());
        sizes.push_back(0);
      }
      found.emplace_back(mine, b);
      ++sizes[mine];
    }
    std::vector<Row> order(sizes.size());
    std::iota(order.begin(), order.end(), Row{0});
    std::stable_sort(order.begin(), order.end(), [&](Row x, Row y) { return sizes[x] > sizes[y]; });
    std::vector<int64_t> next(sizes.size());
    offsets.push_back(0);
    for (const Row c : order) {
      next[c] = offsets.back();
      offsets.push_back(offsets.back() + sizes[c]);
    }
    buckets.resize(found.size());
    for (const auto& [c, b] : found) buckets[next[c]++] = b;
    const int64_t count = static_cast<int64_t>(sizes.size());
    for (int64_t c = 1; c <= count; ++c) {
      if (c == count || offsets[c] - offsets[tasks.back()] >= kBucketsPerTask) tasks.push_back(c);
    }
  }
};

// What every thread sees. Entries of set_of and of the links' parents belong to one component each.
struct Shared {
  const std::string_view* texts;
  const Buckets& buckets;
  const LinkOptions& options;
  Forest<Row> links;
  Row* set_of;  // [n]: number of the text's set in its component's pool, or kNone
};

// One component at a time.
class Linker {
 public:
  void run(const Shared& shared, const int64_t* begin, const int64_t* end) {
    pool_.clear();
    owners_.clear();
    for (const int64_t* b = begin; b < end; ++b) link_bucket(shared, *b);
    if (shared.options.max_cluster > 0) cap(shared, begin, end);
  }

  void release_if_large() {
    constexpr std::size_t kKept = std::size_t{1} << 20;
    if (pool_.large() || std::max({owners_.capacity(), distinct_.capacity(), texts_.capacity()}) > kKept) {
      *this = Linker();
    }
  }

 private:
  void read(const Shared& shared, Row text) {
    Row& set = shared.set_of[text];
    if (set != kNone) return;
    set = pool_.add(shared.texts[text], shared.options.shingles);
    if (set == owners_.size()) owners_.push_back(text);
    shared.links.join(owners_[set], text);
  }

  static std::span<const int64_t> members(const Shared& shared, int64_t bucket) {
    const int64_t* offsets = shared.buckets.offsets + bucket;
    return {shared.buckets.members + offsets[0], shared.buckets.members + offsets[1]};
  }

  void link_bucket(const Shared& shared, int64_t bucket) {
    const auto texts = members(shared, bucket);
    const auto root = [&](int64_t text) { return shared.links.find(static_cast<Row>(text)); };
    const Row first = root(texts[0]);
    if (std::all_of(texts.begin(), texts.end(), [&](int64_t text) { return root(text) == first; })) return;
    if (!shared.options.verify) {
      for (const int64_t text : texts) shared.links.join(first, static_cast<Row>(text));
      return;
    }
    distinct_.clear();
    for (const int64_t text : texts) {
      read(shared, static_cast<Row>(text));
      distinct_.push_back(owners_[shared.set_of[text]]);
    }
    std::sort(distinct_.begin(), distinct_.end());
    distinct_.erase(std::unique(distinct_.begin(), distinct_.end()), distinct_.end());
    join_similar(distinct_, shared.links, [&](Row x, Row y) {
      return pool_.similarity(shared.set_of[y], shared.set_of[x], shared.options.threshold) >= 0;
    });
  }

  // Makes the clusters of more than max_cluster sets anew, as stars.
  void cap(const Shared& shared, const int64_t* begin, const int64_t* end) {
    texts_.clear();
    for (const int64_t* b = begin; b < end; ++b) {
      for (const int64_t text : members(shared, *b)) texts_.push_back(static_cast<Row>(text));
    }
    std::sort(texts_.begin(), texts_.end());
    texts_.erase(std::unique(texts_.begin(), texts_.end()), texts_.end());
    const std::size_t limit = static_cast<std::size_t>(shared.options.max_cluster);
    if (texts_.size() <= limit) return;
    for (const Row text : texts_) read(shared, text);
    std::vector<Row> root(pool_.size());
    std::vector<Row> roots;
    for (Row set = 0; set < pool_.size(); ++set) roots.push_back(root[set] = shared.links.find(owners_[set]));
    std::sort(roots.begin(), roots.end());
    const auto too_large = [&](Row set) {
      const auto [from, to] = std::equal_range(roots.begin(), roots.end(), root[set]);
      return static_cast<std::size_t>(to - from) > limit;
    };
    std::vector<Row> order;
    for (Row set = 0; set < pool_.size(); ++set) {
      if (too_large(set)) order.push_back(set);
    }
    if (order.empty()) return;
    sort_for_stars(order, [&](Row set) { return pool_.print(set); });
    std::vector<Row> place(pool_.size(), kNone);
    for (Row at = 0; at < order.size(); ++at) place[order[at]] = at;
    const Stars stars = make_stars(shared, begin, end, order, place);
    const auto mine = [&](Row text) { return place[shared.set_of[text]]; };
    for (const Row text : texts_) {
      if (mine(text) != kNone) shared.links.parent[text] = text;
    }
    for (const Row text : texts_) {
      if (mine(text) != kNone) shared.links.join(owners_[order[stars.centre(mine(text))]], text);
    }
  }

  // Stars of the sets `order`, whose places in it are `place`. A set is compared with the open centres of its buckets.
  Stars make_stars(const Shared& shared, const int64_t* begin, const int64_t* end, const std::vector<Row>& order,
                   const std::vector<Row>& place) {
    const double threshold = shared.options.verify ? shared.options.threshold : 0.0;
    std::vector<std::vector<Row>> buckets_of(order.size());
    for (const int64_t* b = begin; b < end; ++b) {
      for (const int64_t text : members(shared, *b)) {
        const Row at = place[shared.set_of[text]];
        const Row bucket = static_cast<Row>(b - begin);
        if (at != kNone && (buckets_of[at].empty() || buckets_of[at].back() != bucket)) {
          buckets_of[at].push_back(bucket);
        }
      }
    }
    Stars stars(order.size(), shared.options.max_cluster);
    std::vector<std::vector<Row>> centres(
        static_cast<std::size_t>(end - begin));  // of each bucket, closed ones left out
    std::vector<Row> compared_with(order.size(), kNone);
    for (Row at = 0; at < order.size(); ++at) {
      Stars::Choice choice;
      for (const Row bucket : buckets_of[at]) {
        std::erase_if(centres[bucket], [&](Row centre) { return !stars.open(centre); });
        for (const Row centre : centres[bucket]) {
          if (std::exchange(compared_with[centre], at) == at) continue;
          const double needed = std::max(threshold, choice.similarity());
          if (const double s = pool_.similarity(order[at], order[centre], needed); s >= 0) choice.offer(centre, s);
        }
      }
      if (!stars.place(at, choice)) continue;
      for (const Row bucket : buckets_of[at]) centres[bucket].push_back(at);
    }
    return stars;
  }

  SetPool pool_;
  std::vector<Row> owners_;  // for each set the first text that was found to have it
  std::vector<Row> distinct_, texts_;
};

}  // namespace

void link_similar(const std::string_view* texts, int64_t n, const Buckets& buckets, const LinkOptions& options,
                  const int64_t* rows, int64_t* parent, int64_t num_rows) {
  check(n, buckets, options);
  check_lengths("link_similar", texts, n);
  const Rows forest(n, rows, parent, num_rows);
  std::vector<Row> links = forest.connected(n, options.max_cluster > 0);
  std::vector<Row> candidates = links, set_of(n, kNone);
  const Forest<Row> joined{candidates.data()};
  for (int64_t b = 0; b < buckets.count; ++b) {
    for (int64_t m = buckets.offsets[b] + 1; m < buckets.offsets[b + 1]; ++m) {
      joined.join(static_cast<Row>(buckets.members[m - 1]), static_cast<Row>(buckets.members[m]));
    }
  }
  const Components components(buckets, joined, n);
  const Shared shared{texts, buckets, options, {links.data()}, set_of.data()};
  parallel_for(static_cast<int64_t>(components.tasks.size()) - 1, 1, [&](int64_t task, int64_t) {
    static thread_local Linker linker;
    const int64_t* of = components.buckets.data();
    for (int64_t c = components.tasks[task]; c < components.tasks[task + 1]; ++c) {
      linker.run(shared, of + components.offsets[c], of + components.offsets[c + 1]);
    }
    linker.release_if_large();
  });
  forest.join(shared.links, n);
}

}  // namespace fastsft
