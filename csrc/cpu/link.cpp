// Buckets are gathered by connected component of the candidates. Components share nothing: large ones are verified one
// after the other by all threads, the others each by one thread, with sets of shingles in that thread's scratch.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "component_linker.h"
#include "fastsft/common.h"
#include "fastsft/duplicates.h"
#include "fastsft/parallel.h"
#include "forest.h"

namespace fastsft {
namespace {

using Row = uint32_t;

constexpr Row kNone = ~Row{0};
constexpr int64_t kMembersPerTask = 32;
constexpr int64_t kLargeComponent = 1 << 13;  // members of its buckets

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
// buckets[offsets[c] .. offsets[c + 1]), the component whose buckets have most members first. The first `large`
// components are for all threads. Then task t has the components tasks[t] .. tasks[t + 1].
struct Components {
  std::vector<int64_t> buckets;
  std::vector<int64_t> offsets{0};
  int64_t large = 0;
  std::vector<int64_t> tasks;

  Components(const Buckets& given, const Forest<Row>& candidates, int64_t n) {
    struct Found {
      Row number;
      int64_t buckets = 0, members = 0;
    };
    std::vector<Row> number(n, kNone);
    std::vector<std::pair<Row, int64_t>> all;  // component, bucket
    std::vector<Found> found;
    for (int64_t b = 0; b < given.count; ++b) {
      const int64_t members = given.offsets[b + 1] - given.offsets[b];
      if (members < 2) continue;
      Row& mine = number[candidates.find(static_cast<Row>(given.members[given.offsets[b]]))];
      if (mine == kNone) {
        mine = static_cast<Row>(found.size());
        found.push_back({mine});
      }
      all.emplace_back(mine, b);
      ++found[mine].buckets;
      found[mine].members += members;
    }
    std::vector<Found> order = found;
    std::stable_sort(order.begin(), order.end(), [](const Found& x, const Found& y) { return x.members > y.members; });
    while (large < std::ssize(order) && order[large].members >= kLargeComponent) ++large;
    tasks.push_back(large);
    std::vector<int64_t> next(found.size());
    for (int64_t c = 0, in_task = 0; c < std::ssize(order); ++c) {
      next[order[c].number] = offsets.back();
      offsets.push_back(offsets.back() + order[c].buckets);
      if (c < large) continue;
      in_task += order[c].members;
      if (in_task < kMembersPerTask && c + 1 < std::ssize(order)) continue;
      tasks.push_back(c + 1);
      in_task = 0;
    }
    buckets.resize(all.size());
    for (const auto& [c, b] : all) buckets[next[c]++] = b;
  }

  std::span<const int64_t> operator[](int64_t c) const {
    return std::span(buckets).subspan(offsets[c], offsets[c + 1] - offsets[c]);
  }
};

}  // namespace

void link_similar(const std::string_view* texts, int64_t n, const Buckets& buckets, const LinkOptions& options,
                  const int64_t* rows, int64_t* parent, int64_t num_rows) {
  check(n, buckets, options);
  check_lengths("link_similar", texts, n);
  const Rows forest(n, rows, parent, num_rows);
  std::vector<Row> links = forest.connected(n, options.max_cluster > 0);
  std::vector<Row> candidates = links, set_of(n, kNoSet);
  const Forest<Row> joined{candidates.data()};
  for (int64_t b = 0; b < buckets.count; ++b) {
    for (int64_t m = buckets.offsets[b] + 1; m < buckets.offsets[b + 1]; ++m) {
      joined.join(static_cast<Row>(buckets.members[m - 1]), static_cast<Row>(buckets.members[m]));
    }
  }
  const Components components(buckets, joined, n);
  const LinkJob job{texts, buckets, options, {links.data()}, set_of.data()};
  for (int64_t c = 0; c < components.large; ++c) ComponentLinker().run_with_all_threads(job, components[c]);
  parallel_for(std::ssize(components.tasks) - 1, 1, [&](int64_t task, int64_t) {
    static thread_local ComponentLinker linker;
    for (int64_t c = components.tasks[task]; c < components.tasks[task + 1]; ++c) linker.run(job, components[c]);
    linker.release_if_large();
  });
  forest.join(job.links, n);
}

}  // namespace fastsft
