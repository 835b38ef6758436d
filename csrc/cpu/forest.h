// Private to csrc/cpu: connected components.
#pragma once

#include <utility>
#include <vector>

namespace fastsft {

// Disjoint sets whose root is their smallest member. Parents are the caller's: parent[i] == i at the start. Trees that
// share no member may be used by different threads at a time.
template <typename Index>
struct Forest {
  Index* parent;

  Index find(Index x) const {
    while (parent[x] != x) {
      parent[x] = parent[parent[x]];
      x = parent[x];
    }
    return x;
  }

  // False if the two were connected already.
  bool join(Index x, Index y) const {
    x = find(x);
    y = find(y);
    if (x == y) return false;
    if (y < x) std::swap(x, y);
    parent[y] = x;
    return true;
  }
};

// Joins the members that are similar, directly or through others. `parts` holds the members seen so far, one list per
// component, so that a member already connected to a part costs no comparison.
template <typename Index, typename Similar>
void join_similar(const std::vector<Index>& members, const Forest<Index>& components, const Similar& similar) {
  if (members.size() == 2) {  // nearly always
    const Index x = members[0], y = members[1];
    if (components.find(x) != components.find(y) && similar(x, y)) components.join(x, y);
    return;
  }
  std::vector<std::vector<Index>> parts;
  for (const Index row : members) {
    std::vector<Index> mine{row};
    std::size_t kept = 0;
    for (std::size_t p = 0; p < parts.size(); ++p) {
      bool connected = components.find(parts[p][0]) == components.find(row);
      for (std::size_t m = 0; m < parts[p].size() && !connected; ++m) connected = similar(parts[p][m], row);
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
}

}  // namespace fastsft
