// csrc/cuda/lsh.cu in the emulator: the CPU's labels.
#include "fastsft/lsh.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "check.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

using Numbers = std::vector<int64_t>;

struct Signatures {
  int64_t num_perm;
  std::vector<uint32_t> values;
  int64_t n() const { return static_cast<int64_t>(values.size()) / num_perm; }
};

// Families of rows: copies of a base with some columns changed, shuffled; some are exact copies.
Signatures families(int count, int copies, int64_t num_perm, uint64_t seed) {
  Signatures s{num_perm, {}};
  for (int r = 0; r < count * copies; ++r) {
    const int pick = static_cast<int>(philox(seed, 1, r).x[0] % (count * copies)), family = pick % count;
    const uint32_t change = philox(seed, 2, pick).x[0] % 40;  // per cent
    for (int64_t c = 0; c < num_perm; ++c) {
      const Philox4 x = philox(seed, 3 + pick, c);
      s.values.push_back(x.x[0] % 100 < change ? x.x[1] : philox(seed, 1000000 + family, c).x[0]);
    }
  }
  return s;
}

struct Sorted {
  Numbers keys, order, labels;

  Sorted(const Numbers& all_keys, const Numbers& all_labels) : order(all_keys.size()) {
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return std::tuple(all_keys[i], all_labels[i], i) < std::tuple(all_keys[j], all_labels[j], j);
    });
    for (int64_t i : order) {
      keys.push_back(all_keys[i]);
      labels.push_back(all_labels[i]);
    }
  }
  cuda::LshOrder view() const { return {keys.data(), order.data(), labels.data()}; }
};

// Without the neighbours, the groups have to find every pair.
Numbers on_cuda(const Signatures& s, double threshold, LshShape shape, bool neighbours = true) {
  const int64_t n = s.n();
  std::vector<int32_t> parent(n);
  std::iota(parent.begin(), parent.end(), 0);
  const auto duplicate = std::make_unique<bool[]>(static_cast<std::size_t>(n));
  const cuda::LshRows rows{s.values.data(), n, s.num_perm, parent.data(), duplicate.get()};
  Numbers labels(n, 0);
  const auto sorted = [&](cuda::LshColumns columns) {
    Numbers keys(n, -1);
    cuda::lsh_keys(rows, columns, keys.data(), nullptr);
    return Sorted(keys, labels);
  };
  const auto band = [&](int64_t b) { return cuda::LshColumns{b * shape.rows, shape.rows}; };
  cuda::lsh_merge_duplicates(rows, sorted({0, s.num_perm}).view(), nullptr);
  for (int64_t b = 0; b < (neighbours ? shape.bands : 0); ++b) {
    cuda::lsh_link_neighbours(rows, band(b), sorted(band(b)).view(), threshold, nullptr);
  }
  cuda::lsh_labels(rows, labels.data(), nullptr);
  for (int64_t b = 0; b < shape.bands; ++b) {
    cuda::lsh_link_groups(rows, band(b), sorted(band(b)).view(), threshold, nullptr);
  }
  cuda::lsh_labels(rows, labels.data(), nullptr);
  return labels;
}

Numbers on_cpu(const Signatures& s, double threshold, LshShape shape) {
  Numbers labels(s.n());
  lsh_clusters(s.values.data(), s.n(), s.num_perm, threshold, shape, labels.data());
  return labels;
}

}  // namespace

TEST(labels_of_the_cpu) {
  uint64_t seed = 0;
  for (const LshShape& shape : {LshShape{14, 5}, LshShape{35, 2}, LshShape{70, 1}, LshShape{1, 70}, LshShape{9, 7}}) {
    const Signatures s = families(5, 7, 70, seed++);
    for (double threshold : {0.0, 0.6, 0.75, 1.0}) {
      const Numbers expected = on_cpu(s, threshold, shape);
      CHECK(on_cuda(s, threshold, shape) == expected);
      CHECK(on_cuda(s, threshold, shape, false) == expected);
    }
  }
  for (int64_t num_perm : {1, 33}) {
    const Signatures s = families(3, 4, num_perm, 9);
    CHECK(on_cuda(s, 0.5, {num_perm, 1}) == on_cpu(s, 0.5, {num_perm, 1}));
  }
  CHECK(on_cuda({4, {}}, 0.5, {2, 2}).empty());
  CHECK(on_cuda({2, {5, 6}}, 0.5, {1, 2}) == Numbers{0});
}

TEST(dissimilar_rows_that_share_a_band) {  // two groups, interleaved in one bucket
  Signatures s{40, {}};
  for (uint32_t r = 0; r < 50; ++r) {
    for (uint32_t c = 0; c < 40; ++c) s.values.push_back(c < 4 ? 7 : c < 38 ? r % 2 * 100 + c : r * 1000 + c);
  }
  const Numbers got = on_cuda(s, 0.8, {10, 4});
  CHECK(got == on_cpu(s, 0.8, {10, 4}));
  CHECK(std::count(got.begin(), got.end(), 0) == 25 && std::count(got.begin(), got.end(), 1) == 25);
}

TEST(similar_rows_must_share_a_whole_band) {
  Signatures s{8, {1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 3, 9, 5, 9, 7, 9}};
  CHECK((on_cuda(s, 0.5, {4, 2}) == Numbers{0, 1}));
  CHECK((on_cuda(s, 0.5, {8, 1}) == Numbers{0, 0}));
  int32_t parent[2] = {0, 1};
  bool duplicate[2] = {};
  const int64_t keys[2] = {5, 5}, order[2] = {0, 1};  // as if their hashes collided
  const cuda::LshRows rows{s.values.data(), 2, 8, parent, duplicate};
  cuda::lsh_merge_duplicates(rows, {keys, order, order}, nullptr);
  cuda::lsh_link_neighbours(rows, {0, 2}, {keys, order, order}, 0.5, nullptr);
  cuda::lsh_link_groups(rows, {0, 2}, {keys, order, order}, 0.5, nullptr);
  CHECK(parent[1] == 1 && !duplicate[1]);
}

TEST_MAIN()
