// Private to csrc/cpu: connected components.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace fastsft {

// Disjoint sets whose root is their smallest member. Parents are the caller's: parent[i] == i at the start. Any number
// of threads may find and join at a time, without locks: a parent is always an ancestor, and only a root's changes to
// another tree (Anderson, Woll, "Wait-free parallel algorithms for the union-find problem", STOC 1991). While others
// join, what find returns may be no root any more; when all are done, components and roots are those of any order.
template <typename Index>
struct Forest {
  Index* parent;

  Index find(Index x) const {
    for (Index up = load(x); up != x;) {
      const Index above = load(up);
      if (above != up) std::atomic_ref(parent[x]).store(above, std::memory_order_relaxed);
      x = up;
      up = above;
    }
    return x;
  }

  // False if the two were connected already.
  bool join(Index x, Index y) const {
    for (;;) {
      x = find(x);
      y = find(y);
      if (x == y) return false;
      if (y < x) std::swap(x, y);
      Index root = y;
      if (std::atomic_ref(parent[y]).compare_exchange_strong(root, x, std::memory_order_relaxed)) return true;
    }
  }

 private:
  Index load(Index x) const { return std::atomic_ref(parent[x]).load(std::memory_order_relaxed); }
};

// Joins the members that are similar, directly or through others. `parts` holds the members seen so far, one list per
// component, so that a member already connected to a part costs no comparison. False if it gave up, with so many pairs
// found not to be similar as `failures` had left.
template <typename Index, typename Similar>
bool join_similar(const std::vector<Index>& members, const Forest<Index>& components, int64_t& failures,
                  const Similar& similar) {
  if (members.size() == 2) {  // nearly always
    const Index x = members[0], y = members[1];
    if (components.find(x) != components.find(y) && similar(x, y)) components.join(x, y);
    return true;
  }
  std::vector<std::vector<Index>> parts;
  for (const Index row : members) {
    std::vector<Index> mine{row};
    std::size_t kept = 0;
    for (std::size_t p = 0; p < parts.size(); ++p) {
      bool connected = components.find(parts[p][0]) == components.find(row);
      for (std::size_t m = 0; m < parts[p].size() && !connected; ++m) {
        connected = similar(parts[p][m], row);
        if (!connected && --failures < 0) return false;
      }
      if (connected) {
        components.join(parts[p][0], row);
        if (parts[p].size() > mine.size()) mine.swap(parts[p]);
        mine.insert(mine.end(), parts[p].begin(), parts[p].end());
      } else {
        if (kept != p) parts[kept] = std::move(parts[p]);
        ++kept;
      }
    }
    parts.resize(kept);
    parts.push_back(std::move(mine));
  }
  return true;
}

// The same without a limit.
template <typename Index, typename Similar>
void join_similar(const std::vector<Index>& members, const Forest<Index>& components, const Similar& similar) {
  int64_t failures = std::numeric_limits<int64_t>::max();
  join_similar(members, components, failures, similar);
}

}  // namespace fastsft
