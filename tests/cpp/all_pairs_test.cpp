#include "fastsft/all_pairs.h"

#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/parallel.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

constexpr ShingleOptions kSingleWords{.ngram = 1, .unit = ShingleUnit::kWord};

std::vector<SimilarPair> join(const std::vector<std::string>& texts, double threshold) {
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  return similar_pairs(views.data(), static_cast<int64_t>(views.size()), threshold, kSingleWords);
}

}  // namespace

TEST(all_pairs_of_random_sets) {
  std::vector<std::string> texts;
  std::vector<std::set<uint32_t>> sets;
  for (uint64_t i = 0; i < 300; ++i) {
    std::set<uint32_t> words;
    for (uint64_t w = 0; w < 4 + i % 20; ++w) words.insert(philox(3, i / 3, w).x[philox(4, i, w).x[0] % 8 == 0] % 60);
    std::string text;
    for (const uint32_t w : words) {
      text += std::to_string(w);
      text += ' ';
    }
    texts.push_back(text);
    sets.push_back(words);
  }
  for (const double threshold : {0.25, 0.5, 0.8, 1.0}) {
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      const std::vector<SimilarPair> found = join(texts, threshold);
      std::size_t next = 0;
      for (int64_t x = 0; x < 300; ++x) {
        for (int64_t y = x + 1; y < 300; ++y) {
          std::size_t common = 0;
          for (const uint32_t w : sets[x]) common += sets[y].count(w);
          const double similarity =
              static_cast<double>(common) / static_cast<double>(sets[x].size() + sets[y].size() - common);
          if (similarity < threshold) continue;
          CHECK(next < found.size() && found[next].x == x && found[next].y == y);
          CHECK(next < found.size() && found[next].similarity == similarity);
          ++next;
        }
      }
      CHECK(next == found.size());
      CHECK(next > (threshold < 1 ? 20u : 0u));
    }
  }
}

TEST(broken_arguments) {
  CHECK(join({}, 0.5).empty());
  CHECK_THROWS(join({"a"}, 0.0), Error);
  CHECK_THROWS(join({"a"}, 1.5), Error);
  int64_t label = 0;
  const std::string_view text = "a";
  CHECK_THROWS(all_pairs_clusters(&text, 1, {.threshold = 0.5, .shingles = {.ngram = 0}}, &label), Error);
}

TEST_MAIN()
