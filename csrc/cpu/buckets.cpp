// Most keys occur once. A first pass over a table of bytes, small enough for the second cache, finds nearly all of
// those; only the rest is grouped exactly. Per key: 16 bytes read and three accesses to the table.
#include "buckets.h"

#include <bit>

namespace fastsft {
namespace {

// Keys are mixed in their low bits already; the multiplication draws on all of them.
uint64_t scatter(int64_t key) { return static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u; }

}  // namespace

BucketList equal_keys(const int64_t* keys, int64_t n) {
  const int bits = std::bit_width(static_cast<uint64_t>(n)) + 1;
  const auto place = [&](int64_t key) { return scatter(key) >> (64 - bits); };
  std::vector<uint8_t> seen(std::size_t{1} << bits);  // 0, 1, or 2 for more
  for (int64_t i = 0; i < n; ++i) {
    uint8_t& count = seen[place(keys[i])];
    count = static_cast<uint8_t>(count + (count < 2));
  }
  std::vector<int64_t> rows(n);
  int64_t repeated = 0;
  for (int64_t i = 0; i < n; ++i) {
    rows[repeated] = i;
    repeated += seen[place(keys[i])] == 2;
  }

  // A group for each key, in order of its first row; then a counting sort by group.
  const int slot_bits = std::bit_width(static_cast<uint64_t>(repeated)) + 1;
  std::vector<int64_t> slots(std::size_t{1} << slot_bits, -1);
  std::vector<int64_t> group_of(repeated), group_key, group_size;
  for (int64_t r = 0; r < repeated; ++r) {
    const int64_t key = keys[rows[r]];
    uint64_t at = scatter(key) >> (64 - slot_bits);
    while (slots[at] >= 0 && group_key[slots[at]] != key) at = (at + 1) & (slots.size() - 1);
    if (slots[at] < 0) {
      slots[at] = static_cast<int64_t>(group_key.size());
      group_key.push_back(key);
      group_size.push_back(0);
    }
    group_of[r] = slots[at];
    ++group_size[slots[at]];
  }
  BucketList buckets;
  std::vector<int64_t> next(group_size.size(), -1);
  int64_t total = 0;
  for (std::size_t g = 0; g < group_size.size(); ++g) {
    if (group_size[g] < 2) continue;
    next[g] = total;
    total += group_size[g];
    buckets.offsets.push_back(total);
  }
  buckets.members.resize(total);
  for (int64_t r = 0; r < repeated; ++r) {
    if (int64_t& at = next[group_of[r]]; at >= 0) buckets.members[at++] = rows[r];
  }
  return buckets;
}

}  // namespace fastsft
