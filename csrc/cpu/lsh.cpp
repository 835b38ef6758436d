// Per row and band: rows * 4 bytes read, one 64-bit key, one probe of a hash table that fits the cache for 10^5 rows.
// Bands are independent and run in parallel; verification is serial, since only candidates reach it, and each costs one
// comparison of two rows (num_perm * 8 bytes).
#include "fastsft/lsh.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"
#include "forest.h"
#include "lsh_key.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(int64_t, count_equal, const uint32_t* x, const uint32_t* y, int64_t n)

namespace {

using Row = uint32_t;
using Buckets = std::vector<std::pair<Row, Row>>;  // (first row with the key, later row), by first row, then later row

// Groups the given rows by columns [first, first + width); rows alone with their values are left out.
Buckets group(const uint32_t* signatures, int64_t num_perm, int64_t first, int64_t width,
              const std::vector<Row>& rows) {
  const std::size_t slots = std::bit_ceil(2 * rows.size() + 1);
  struct Slot {
    uint32_t tag;      // of the key; spares most looks at the rows themselves
    Row row_plus_one;  // 0: free
  };
  std::vector<Slot> table(slots, Slot{0, 0});
  Buckets buckets;
  for (const Row row : rows) {
    const uint32_t* values = signatures + row * num_perm + first;
    const uint64_t key = static_cast<uint64_t>(lsh_key(values, width));
    const uint32_t tag = static_cast<uint32_t>(key >> 32);
    const auto differs = [&](const Slot& slot) {
      return slot.tag != tag ||
             !std::equal(values, values + width, signatures + (slot.row_plus_one - 1) * num_perm + first);
    };
    std::size_t at = key & (slots - 1);
    while (table[at].row_plus_one != 0 && differs(table[at])) at = (at + 1) & (slots - 1);
    if (table[at].row_plus_one == 0) {
      table[at] = {tag, row + 1};
    } else {
      buckets.emplace_back(table[at].row_plus_one - 1, row);
    }
  }
  std::sort(buckets.begin(), buckets.end());
  return buckets;
}

// Integral of f over [from, to] by five-point Gauss-Legendre on equal panels, as nodes and weights.
struct Quadrature {
  std::vector<double> at, weight;

  Quadrature(double from, double to) {
    constexpr std::array<double, 3> node{0.0, 0.5384693101056831, 0.9061798459386640};
    constexpr std::array<double, 3> part{0.5688888888888889, 0.4786286704993665, 0.2369268850561891};
    constexpr int kPanels = 32;
    const double half = (to - from) / kPanels / 2;
    for (int p = 0; p < kPanels; ++p) {
      const double middle = from + (2 * p + 1) * half;
      for (int i = -2; i <= 2; ++i) {
        at.push_back(middle + (i < 0 ? -1 : 1) * node[std::abs(i)] * half);
        weight.push_back(part[std::abs(i)] * half);
      }
    }
  }
};

void check_threshold(const char* op, double threshold) {
  FASTSFT_CHECK(threshold >= 0.0 && threshold <= 1.0, op, ": threshold: expected a number in [0, 1], got ", threshold);
}

}  // namespace

LshShape lsh_shape(int64_t num_perm, double threshold) {
  FASTSFT_CHECK(num_perm >= 1, "lsh_shape: num_perm: expected >= 1, got ", num_perm);
  check_threshold("lsh_shape", threshold);
  const Quadrature below(0.0, threshold), above(threshold, 1.0);
  const std::size_t nodes = below.at.size();
  LshShape best{1, 1};
  double least = 2.0;
  // 1 - s^rows and its powers, kept from one (rows, bands) to the next
  std::vector<double> miss_below(nodes), miss_above(nodes), power_below(nodes, 1.0), power_above(nodes, 1.0);
  for (int64_t rows = 1; rows <= num_perm; ++rows) {
    for (std::size_t i = 0; i < nodes; ++i) {
      power_below[i] *= below.at[i];
      power_above[i] *= above.at[i];
    }
    std::fill(miss_below.begin(), miss_below.end(), 1.0);
    std::fill(miss_above.begin(), miss_above.end(), 1.0);
    for (int64_t bands = 1; bands * rows <= num_perm; ++bands) {
      double error = 0.0;
      for (std::size_t i = 0; i < nodes; ++i) {
        miss_below[i] *= 1.0 - power_below[i];
        miss_above[i] *= 1.0 - power_above[i];
        error += 0.5 * below.weight[i] * (1.0 - miss_below[i]) + 0.5 * above.weight[i] * miss_above[i];
      }
      if (error < least || (error == least && bands < best.bands)) {
        least = error;
        best = {bands, rows};
      }
    }
  }
  return best;
}

void lsh_keys(const uint32_t* signatures, int64_t n, int64_t num_perm, LshShape shape, int64_t* keys) {
  check_shape("lsh_keys", shape, num_perm);
  parallel_for(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t* row = signatures + i * num_perm;
      for (int64_t b = 0; b < shape.bands; ++b) keys[b * n + i] = lsh_key(row + b * shape.rows, shape.rows);
    }
  });
}

void lsh_clusters(const uint32_t* signatures, int64_t n, int64_t num_perm, double threshold, LshShape shape,
                  int64_t* labels) {
  check_shape("lsh_clusters", shape, num_perm);
  check_threshold("lsh_clusters", threshold);
  FASTSFT_CHECK(n < 0xFFFFFFFF, "lsh_clusters: signatures: expected fewer than 2^32 - 1 rows, got ", n);
  const auto equal = FASTSFT_ISA_SELECT(count_equal);
  const auto row = [&](Row i) { return signatures + static_cast<int64_t>(i) * num_perm; };
  const int64_t needed = lsh_needed(num_perm, threshold);
  const auto similar = [&](Row i, Row j) { return equal(row(i), row(j), num_perm) >= needed; };

  std::vector<Row> parent(n);
  std::iota(parent.begin(), parent.end(), Row{0});
  Forest<Row> components{parent.data()};
  std::vector<Row> distinct(n);
  for (int64_t i = 0; i < n; ++i) distinct[i] = static_cast<Row>(i);
  for (const auto& [first, later] : group(signatures, num_perm, 0, num_perm, distinct)) components.join(first, later);
  std::erase_if(distinct, [&](Row i) { return components.find(i) != i; });

  std::vector<Buckets> bands(shape.bands);
  parallel_for(shape.bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) bands[b] = group(signatures, num_perm, b * shape.rows, shape.rows, distinct);
  });
  std::vector<Row> members;
  for (const Buckets& buckets : bands) {
    for (std::size_t i = 0; i < buckets.size();) {
      const Row first = buckets[i].first;
      members.assign(1, first);
      for (; i < buckets.size() && buckets[i].first == first; ++i) members.push_back(buckets[i].second);
      join_similar(members, components, similar);
    }
  }
  for (int64_t i = 0; i < n; ++i) labels[i] = components.find(static_cast<Row>(i));
}

}  // namespace fastsft
