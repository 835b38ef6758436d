// Per sequence: one radix-sort pass per 12 bits of the capacity (12 bytes read and written each), one search of the
// open bins, 16 bytes of output. Bins of equal room share one node, so the tree has at most min(bins, capacity) nodes;
// this is latency- bound pointer work and is not parallel, because each choice depends on the one before.
#include "fastsft/pack.h"

#include <array>
#include <functional>
#include <map>
#include <queue>
#include <vector>

#include "fastsft/common.h"

namespace fastsft {
namespace {

// Indices by descending length, equal lengths by ascending index: a stable radix sort on the distance to capacity.
std::vector<int64_t> longest_first(const int64_t* lengths, int64_t n, int64_t capacity) {
  constexpr int kBits = 12;
  constexpr int64_t kDigits = int64_t{1} << kBits;
  std::vector<int64_t> order(n), previous(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  for (int shift = 0; shift < 63 && (capacity >> shift) != 0; shift += kBits) {
    std::vector<int64_t> start(kDigits + 1);
    const auto digit = [&](int64_t i) { return ((capacity - lengths[i]) >> shift) & (kDigits - 1); };
    for (int64_t i = 0; i < n; ++i) ++start[digit(i) + 1];
    for (int64_t d = 0; d < kDigits; ++d) start[d + 1] += start[d];
    previous.swap(order);
    for (const int64_t i : previous) order[start[digit(i)]++] = i;
  }
  return order;
}

// The open bins by the room left in them.
class Room {
 public:
  // Takes out the bin with the least room >= length (the lowest-numbered such bin): {room, bin}, or bin -1.
  std::array<int64_t, 2> take(int64_t length) {
    const auto level = levels_.lower_bound(length);
    if (level == levels_.end()) return {0, -1};
    const int64_t room = level->first, bin = level->second.top();
    level->second.pop();
    if (level->second.empty()) {
      spare_ = levels_.extract(level);  // reused by the next put: no allocation in the steady state
    }
    return {room, bin};
  }

  void put(int64_t room, int64_t bin) {
    if (!spare_.empty()) {
      spare_.key() = room;
      spare_.mapped().push(bin);
      auto done = levels_.insert(std::move(spare_));
      if (done.inserted) return;
      spare_ = std::move(done.node);
      spare_.mapped().pop();
      done.position->second.push(bin);
      return;
    }
    levels_[room].push(bin);
  }

 private:
  using Bins = std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>>;
  std::map<int64_t, Bins> levels_;
  std::map<int64_t, Bins>::node_type spare_;
};

}  // namespace

int64_t pack_best_fit(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* order, int64_t* offsets) {
  FASTSFT_CHECK(capacity >= 1, "pack_sequences: capacity: expected >= 1, got ", capacity);
  for (int64_t i = 0; i < n; ++i) {
    FASTSFT_CHECK(lengths[i] >= 0 && lengths[i] <= capacity, "pack_sequences: lengths[", i,
                  "]: expected 0 <= length <= capacity = ", capacity, ", got ", lengths[i]);
  }
  const std::vector<int64_t> sorted = longest_first(lengths, n, capacity);
  std::vector<int64_t> bin_of(n);
  std::vector<int64_t> ends;  // per bin: its size, then where its next member goes in `order`
  Room rooms;
  for (const int64_t i : sorted) {
    auto [room, bin] = rooms.take(lengths[i]);
    if (bin < 0) {
      room = capacity;
      bin = static_cast<int64_t>(ends.size());
      ends.push_back(0);
    }
    rooms.put(room - lengths[i], bin);
    bin_of[i] = bin;
    ++ends[bin];
  }
  const int64_t bins = static_cast<int64_t>(ends.size());
  offsets[0] = 0;
  for (int64_t b = 0; b < bins; ++b) {
    offsets[b + 1] = offsets[b] + ends[b];
    ends[b] = offsets[b];
  }
  for (const int64_t i : sorted) order[ends[bin_of[i]]++] = i;
  return bins;
}

}  // namespace fastsft
