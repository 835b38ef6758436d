#include "fastsft/pack.h"

#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

std::vector<std::vector<int64_t>> pack(const std::vector<int64_t>& lengths, int64_t capacity) {
  const int64_t n = static_cast<int64_t>(lengths.size());
  std::vector<int64_t> order(n), offsets(n + 1);
  const int64_t bins = pack_best_fit(lengths.data(), n, capacity, order.data(), offsets.data());
  std::vector<std::vector<int64_t>> out;
  for (int64_t b = 0; b < bins; ++b) out.emplace_back(order.begin() + offsets[b], order.begin() + offsets[b + 1]);
  return out;
}

}  // namespace

TEST(best_fit_by_hand) {
  using Bins = std::vector<std::vector<int64_t>>;
  CHECK(pack({}, 10) == Bins{});
  CHECK((pack({3, 7, 5, 5, 2}, 10) == Bins{{1, 0}, {2, 3}, {4}}));
  CHECK((pack({6, 6, 4}, 10) == Bins{{0, 2}, {1}}));        // equally full: the lowest bin
  CHECK((pack({6, 7, 3, 0}, 10) == Bins{{1, 2, 3}, {0}}));  // nothing weighs nothing, and goes where it is fullest
  CHECK((pack({1}, int64_t{1} << 60) == Bins{{0}}));
}

TEST(wrong_arguments) {
  CHECK_THROWS(pack({1, 11}, 10), Error);
  CHECK_THROWS(pack({1, -1}, 10), Error);
  CHECK_THROWS(pack({}, 0), Error);
}

TEST(every_sequence_once_and_no_bin_too_full) {
  std::vector<int64_t> lengths;
  for (uint64_t i = 0; i < 3000; ++i) lengths.push_back(uniform_below(philox(3, 0, i).x[0], 5001));
  std::vector<int> seen(lengths.size());
  for (const auto& bin : pack(lengths, 5000)) {
    int64_t used = 0;
    for (const int64_t i : bin) {
      used += lengths[i];
      ++seen[i];
    }
    CHECK(!bin.empty() && used <= 5000);
  }
  for (const int n : seen) CHECK(n == 1);
}

TEST_MAIN()
