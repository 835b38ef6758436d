#include "fastsft/duplicates.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

using Labels = std::vector<int64_t>;

// Each text in an allocation of exactly its size, so that a sanitizer sees any access past it.
struct Texts {
  std::vector<std::vector<char>> bytes;
  std::vector<std::string_view> views;

  explicit Texts(const std::vector<std::string>& texts) {
    for (const std::string& text : texts) bytes.emplace_back(text.begin(), text.end());
    for (const auto& text : bytes) views.emplace_back(text.data(), text.size());
  }
  int64_t size() const { return static_cast<int64_t>(views.size()); }
};

std::vector<std::string> families() {
  std::vector<std::string> texts{"", ".", "x"};
  for (uint64_t family = 0; family < 40; ++family) {
    for (uint64_t copy = 0; copy < 6; ++copy) {
      std::string text;
      for (uint64_t w = 0; w < 30 + family; ++w) {
        const bool changed = philox(1, family * 100 + copy, w).x[0] % 100 < copy;
        text += 'w';
        text += std::to_string(philox(changed ? 2 + copy : 0, family, w).x[0] % 5000);
        text += ' ';
      }
      texts.push_back(text);
    }
  }
  return texts;
}

Labels cluster(const Texts& texts, const LinkOptions& options) {
  Labels labels(texts.views.size());
  near_duplicates(texts.views.data(), texts.size(), {.ngram = options.shingles.ngram}, {32, 4}, options, labels.data());
  return labels;
}

void link(const Texts& texts, const Labels& members, const Labels& offsets, const LinkOptions& options,
          Labels& parent) {
  link_similar(texts.views.data(), texts.size(),
               {members.data(), offsets.data(), static_cast<int64_t>(offsets.size()) - 1}, options, nullptr,
               parent.data(), static_cast<int64_t>(parent.size()));
}

}  // namespace

TEST(same_clusters_on_every_isa_and_thread_count) {
  const Texts texts(families());
  for (const int64_t limit : {0, 2}) {
    const LinkOptions options{.threshold = 0.5, .shingles = {.ngram = 3}, .max_cluster = limit};
    set_num_threads(1);
    set_isa(Isa::kBase);
    const Labels expected = cluster(texts, options);
    CHECK(expected[1] == 0 && expected[2] == 2);
    for (const Isa isa : available_isas()) {
      set_isa(isa);
      for (const int threads : {1, 2, 4}) {
        set_num_threads(threads);
        CHECK(cluster(texts, options) == expected);
      }
    }
  }
}

TEST(links) {
  const Texts texts({"a b c d", "a b c d e", "a b c d e f", "q r s", "Q, R, S", "a b"});
  const LinkOptions options{.threshold = 0.8, .shingles = {.ngram = 1}};
  Labels parent(6);
  const auto reset = [&] { std::iota(parent.begin(), parent.end(), 0); };
  reset();
  link(texts, {2, 1, 0, 3, 4, 5}, {0, 3, 6}, options, parent);
  CHECK((parent == Labels{0, 0, 0, 3, 3, 5}));
  reset();
  link(texts, {0, 2, 4, 3}, {0, 2, 4}, options, parent);  // 0 and 2 are linked through 1 only
  CHECK((parent == Labels{0, 1, 2, 3, 3, 5}));
  link(texts, {0, 1, 2, 1}, {0, 0, 2, 4}, options, parent);
  CHECK((parent == Labels{0, 0, 0, 3, 3, 5}));
  reset();
  link(texts, {0, 1, 2, 3, 4}, {0, 3, 5}, {.threshold = 0.8, .shingles = {.ngram = 1}, .max_cluster = 2}, parent);
  CHECK((parent == Labels{0, 1, 1, 3, 3, 5}));  // 5/6 before 4/5, wherever the centre is
}

TEST(stars_are_full_where_all_are_similar) {
  std::vector<std::string> similar;
  for (int i = 0; i < 50; ++i) similar.push_back("a b c d e f g h i j x" + std::to_string(i));
  const Texts texts(similar);
  const LinkOptions options{.threshold = 0.8, .shingles = {.ngram = 1}, .max_cluster = 7};
  Labels members(50), parent(50);
  std::iota(members.begin(), members.end(), 0);
  std::iota(parent.begin(), parent.end(), 0);
  link(texts, members, {0, 50}, options, parent);
  Labels size(50);
  for (const int64_t label : parent) ++size[label];
  CHECK(std::count(size.begin(), size.end(), 7) == 7 && std::count(size.begin(), size.end(), 1) == 1);
}

TEST(broken_arguments) {
  const Texts texts({"a", "b"});
  Labels parent{0, 1};
  CHECK_THROWS(link(texts, {0, 2}, {0, 2}, {}, parent), Error);
  CHECK_THROWS(link(texts, {0, -1}, {0, 2}, {}, parent), Error);
  CHECK_THROWS(link(texts, {0, 1}, {0, 2, 1}, {}, parent), Error);
  CHECK_THROWS(link(texts, {0, 1}, {0, 2}, {.threshold = 1.5, .shingles = {}}, parent), Error);
  CHECK_THROWS(link(texts, {0, 1}, {0, 2}, {.shingles = {.ngram = 0}}, parent), Error);
  parent = {1, 1};
  CHECK_THROWS(link(texts, {0, 1}, {0, 2}, {}, parent), Error);
  parent = {0, -3};
  CHECK_THROWS(link(texts, {0, 1}, {0, 2}, {}, parent), Error);
}

TEST_MAIN()
