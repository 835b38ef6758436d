// Private to csrc/cpu: sets of 64-bit shingle hashes (shingles.h), and the size of their intersections.
//
// An intersection costs one probe of a hash table in the first cache per element of a set, and stops as soon as it is
// known to be too small.
#pragma once

#include <algorithm>
#include <bit>
#include <compare>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "shingler.h"

namespace fastsft {

using Shingles = std::span<const uint64_t>;

// Tells sets apart: equal for equal sets, for others by a chance of about 2^-128.
struct Fingerprint {
  uint64_t sum = 0, products = 0;  // over the elements: of each, of its two halves' product
  uint32_t size = 0;
  auto operator<=>(const Fingerprint&) const = default;
};

// Open addressing over nonzero hashes, at most half full.
class ShingleTable {
 public:
  void clear(int64_t room) {
    const std::size_t slots = std::bit_ceil(static_cast<std::size_t>(2 * room + 2));
    slots_.assign(slots, 0);
    mask_ = slots - 1;
  }

  // Makes room for so many in all, those already in it included.
  void grow(int64_t room) {
    if (static_cast<std::size_t>(2 * room + 2) <= slots_.size()) return;
    const std::vector<uint64_t> old = std::move(slots_);
    slots_ = {};
    clear(room);
    for (const uint64_t h : old) {
      if (h != 0) insert(h);
    }
  }

  bool insert(uint64_t hash) {
    uint64_t at = hash & mask_;
    while (slots_[at] != 0) {
      if (slots_[at] == hash) return false;
      at = (at + 1) & mask_;
    }
    slots_[at] = hash;
    return true;
  }

  bool contains(uint64_t hash) const {
    uint64_t at = hash & mask_;
    while (slots_[at] != 0) {
      if (slots_[at] == hash) return true;
      at = (at + 1) & mask_;
    }
    return false;
  }

  bool large() const { return slots_.capacity() > std::size_t{1} << 21; }

 private:
  uint64_t mask_ = 0;
  std::vector<uint64_t> slots_;
};

// Appends the distinct shingles of the text to `sets`, in its order, and leaves them in the table.
Fingerprint append_distinct(std::string_view text, const ShingleOptions& options, Shingler<uint64_t>& shingler,
                            ShingleTable& table, std::vector<uint64_t>& sets);

// Of two sets without elements: 1.
inline double jaccard(int64_t common, int64_t x, int64_t y) {
  return x + y == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(x + y - common);
}

// The least number of common elements that gives sets of x and y elements a similarity of at least `threshold`; more
// than both have where none does.
inline int64_t least_common(int64_t x, int64_t y, double threshold) {
  const int64_t most = std::min(x, y);
  // Rounding puts the estimate off by less than one, either way.
  int64_t common = static_cast<int64_t>(threshold / (1.0 + threshold) * static_cast<double>(x + y)) - 1;
  common = std::clamp<int64_t>(common, 0, most);
  while (common <= most && jaccard(common, x, y) < threshold) ++common;
  return common;
}

// Number of elements of `set` in the table; any number below `needed` where there are not so many.
inline int64_t count_common(const ShingleTable& table, Shingles set, int64_t needed) {
  constexpr std::size_t kBlock = 16;
  int64_t common = 0;
  for (std::size_t i = 0; i < set.size(); i += kBlock) {
    if (common + static_cast<int64_t>(set.size() - i) < needed) break;
    for (const uint64_t h : set.subspan(i, std::min(kBlock, set.size() - i))) common += table.contains(h);
  }
  return common;
}

// A set for comparison. Elements that no other set has may be left out; `size` counts them.
struct SetView {
  uint32_t id;
  uint32_t size;
  Shingles elements;
};

class SetComparer {
 public:
  // Their similarity if it is at least `threshold`, otherwise -1. Fast for one after the other with the same x.
  double similarity(SetView x, SetView y, double threshold);

  // For a caller that fills the table itself: forget(), then fill it, then holds(set).
  ShingleTable& table() { return table_; }
  void holds(uint32_t set) { in_table_ = set; }
  void forget() { in_table_ = -1; }
  bool large() const { return table_.large(); }

 private:
  ShingleTable table_;
  int64_t in_table_ = -1;  // the id of the set that the table holds
};

// Numbers distinct fingerprints in the order in which they come.
class PrintIndex {
 public:
  void clear();
  uint32_t add(const Fingerprint& print);
  uint32_t size() const { return static_cast<uint32_t>(prints_.size()); }
  const Fingerprint& operator[](uint32_t number) const { return prints_[number]; }
  std::vector<Fingerprint> take() { return std::move(prints_); }

 private:
  std::size_t slot(const Fingerprint& print) const;

  std::vector<Fingerprint> prints_;
  std::vector<uint32_t> slots_;  // open addressing, at most half full: number + 1, or 0
};

// The distinct sets among some texts.
class SetPool {
 public:
  void clear();
  bool large() const { return elements_.capacity() > std::size_t{1} << 20 || comparer_.large() || shingler_.large(); }

  // The number of the text's set: that of an equal one if there is one already.
  uint32_t add(std::string_view text, const ShingleOptions& options);
  uint32_t add(const Fingerprint& print, Shingles elements);

  uint32_t size() const { return prints_.size(); }
  const Fingerprint& print(uint32_t set) const { return prints_[set]; }
  SetView operator[](uint32_t set) const {
    const uint32_t size = prints_[set].size;
    return {set, size, Shingles(elements_).subspan(begins_[set], size)};
  }

  // One that knows the set last added.
  SetComparer& comparer() { return comparer_; }

 private:
  Shingler<uint64_t> shingler_;
  SetComparer comparer_;
  std::vector<uint64_t> elements_;
  std::vector<std::size_t> begins_;
  PrintIndex prints_;
};

}  // namespace fastsft
