#include "fastsft/overlap.h"

#include <string>
#include <vector>

#include "check.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

Overlaps overlap(const std::vector<std::string>& texts, const std::vector<std::string>& references,
                 std::vector<int64_t> ngrams, const std::vector<double>* above = nullptr) {
  const std::vector<std::string_view> t(texts.begin(), texts.end()), r(references.begin(), references.end());
  const NgramIndex index(r.data(), static_cast<int64_t>(r.size()), std::move(ngrams));
  return ngram_overlap(t.data(), static_cast<int64_t>(t.size()), index, above);
}

}  // namespace

TEST(counts_and_passages) {
  const Overlaps found = overlap({"nothing here", "x a b c d y c d e f"}, {"a, b; c d e f", "c d", ""}, {2, 3});
  CHECK((found.pairs == std::vector<int64_t>{1, 0, 1, 1}));
  const Shared two = found.shared[0], three = found.shared[1];
  CHECK(two.ngrams == 5 && two.words == 6 && two.begin == 0 && two.end == 13);
  CHECK(three.ngrams == 4 && three.words == 6 && three.begin == 0 && three.end == 13);
  CHECK(found.shared[2].words == 2 && found.shared[3].words == 0 && found.shared[3].end == 0);
}

TEST(best_pair_of_a_text) {
  const std::vector<double> above = {0.5};
  const Overlaps found = overlap({"a b c", "q", "a b c d"}, {"a b z z", "a b c d", "a b c d"}, {2}, &above);
  CHECK((found.pairs == std::vector<int64_t>{0, 1, 2, 1}));
  CHECK(found.shared.size() == 2 && found.shared[0].words == 3 && found.shared[1].words == 4);
  CHECK((found.found == std::vector<uint8_t>{0, 1, 1}));
}

TEST(any_number_of_threads) {
  std::vector<std::string> texts, references;
  for (int i = 0; i < 500; ++i) {
    std::string text;
    for (int w = 0; w < 40; ++w) text += std::to_string((i * 7 + w * (i % 3)) % 50) + " ";
    (i % 10 == 0 ? references : texts).push_back(text);
  }
  set_num_threads(1);
  const Overlaps one = overlap(texts, references, {2, 5, 9});
  set_num_threads(4);
  const Overlaps four = overlap(texts, references, {2, 5, 9});
  CHECK(one.pairs == four.pairs && !one.pairs.empty());
  const std::vector<double> above = {0.2, 0.3, 0.4};
  const Overlaps best = overlap(texts, references, {2, 5, 9}, &above);
  set_num_threads(1);
  const Overlaps same = overlap(texts, references, {2, 5, 9}, &above);
  CHECK(best.pairs == same.pairs && best.found == same.found && !best.pairs.empty());
  for (std::size_t i = 0; i < one.shared.size(); ++i) {
    CHECK(one.shared[i].words == four.shared[i].words && one.shared[i].begin == four.shared[i].begin);
  }
}

TEST(lengths_are_checked) {
  CHECK_THROWS(overlap({}, {"a"}, {}), Error);
  CHECK_THROWS(overlap({}, {"a"}, {0}), Error);
  CHECK_THROWS(overlap({}, {"a"}, {3, 2}), Error);
}

TEST_MAIN()
