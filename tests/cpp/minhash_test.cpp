#include "fastsft/minhash.h"

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/lsh.h"
#include "fastsft/parallel.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

using Signatures = std::vector<uint32_t>;

Signatures sign(const std::vector<std::string>& texts, const MinHashOptions& options = {}) {
  // Each text in an allocation of exactly its size, so that a sanitizer sees any access past it.
  std::vector<std::vector<char>> exact;
  std::vector<std::string_view> views;
  for (const std::string& text : texts) exact.emplace_back(text.begin(), text.end());
  for (const auto& text : exact) views.emplace_back(text.data(), text.size());
  Signatures out(texts.size() * options.num_perm);
  minhash_signatures(views.data(), static_cast<int64_t>(views.size()), options, out.data());
  return out;
}

std::vector<int64_t> cluster(const Signatures& signatures, int64_t num_perm, double threshold, LshShape shape) {
  std::vector<int64_t> labels(signatures.size() / num_perm);
  lsh_clusters(signatures.data(), static_cast<int64_t>(labels.size()), num_perm, threshold, shape, labels.data());
  return labels;
}

}  // namespace

TEST(every_length_around_the_block) {
  std::vector<std::string> texts;
  for (int n = 0; n < 200; ++n) {
    texts.push_back(std::string(n, 'x'));
    texts.push_back(std::string(n, ' ') + "y");
    std::string mixed;
    for (int i = 0; i < n; ++i) mixed += "ab C_\xC3\xA9 "[(i * 7 + n) % 7];
    texts.push_back(mixed);
  }
  for (const ShingleUnit unit : {ShingleUnit::kWord, ShingleUnit::kChar}) {
    const MinHashOptions options{.num_perm = 70, .ngram = 3, .unit = unit, .seed = 4};
    set_num_threads(1);
    set_isa(Isa::kBase);
    const Signatures expected = sign(texts, options);
    for (const Isa isa : available_isas()) {
      set_isa(isa);
      set_num_threads(3);
      CHECK(sign(texts, options) == expected);
    }
  }
}

TEST(words) {
  CHECK(sign({"Foo(bar)"}) == sign({"foo bar"}));
  CHECK(sign({"foo bar"}) != sign({"bar foo"}));
  CHECK(sign({"", "."}) == Signatures(256, 0xFFFFFFFFu));
  const Signatures before = sign({"a b c"});
  CHECK(sign({std::string(3 << 20, 'q'), "a b c"}).back() == before.back());  // scratch given back in between
}

TEST(any_bytes_are_safe) {
  std::string bytes;
  for (uint64_t i = 0; i < 5000; ++i) bytes += static_cast<char>(philox(8, 0, i).x[0]);
  for (int n = 0; n < 300; ++n) {
    const std::string text = bytes.substr(n * 13, n);
    CHECK(sign({text}).size() == 128);
    CHECK(sign({text}, {.unit = ShingleUnit::kChar}).size() == 128);
  }
}

TEST(tokens) {
  std::vector<int32_t> tokens;
  std::vector<int64_t> cu{0};
  for (int n = 0; n < 90; ++n) {
    for (int i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(philox(2, n, i).x[0] % 1000));
    cu.push_back(static_cast<int64_t>(tokens.size()));
  }
  tokens.shrink_to_fit();
  const std::vector<int64_t> wide(tokens.begin(), tokens.end());
  const MinHashOptions options{.num_perm = 70, .ngram = 3, .seed = 4};
  const int64_t n = static_cast<int64_t>(cu.size()) - 1, total = static_cast<int64_t>(tokens.size());
  Signatures expected;
  for (const Isa isa : available_isas()) {
    set_isa(isa);
    Signatures narrow_out(n * 70), wide_out(n * 70);
    minhash_token_signatures(tokens.data(), total, cu.data(), n, options, narrow_out.data());
    minhash_token_signatures(wide.data(), total, cu.data(), n, options, wide_out.data());
    if (expected.empty()) expected = narrow_out;
    CHECK(narrow_out == expected);
    CHECK(wide_out == expected);
  }
  CHECK(expected[0] == 0xFFFFFFFFu && expected[70] != 0xFFFFFFFFu);
  cu[3] = 0;
  CHECK_THROWS(minhash_token_signatures(tokens.data(), total, cu.data(), n, options, expected.data()), Error);
}

TEST(clusters) {
  CHECK(cluster({}, 4, 0.5, {2, 2}).empty());
  const Signatures rows{1, 2, 3, 4, 9, 9, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9};
  CHECK((cluster(rows, 4, 0.5, {2, 2}) == std::vector<int64_t>{0, 0, 0, 3, 0}));
  CHECK((cluster(rows, 4, 0.75, {2, 2}) == std::vector<int64_t>{0, 1, 0, 3, 4}));
  CHECK((cluster(rows, 4, 0.5, {1, 2}) == std::vector<int64_t>{0, 1, 0, 3, 1}));
  CHECK_THROWS(cluster(rows, 4, 0.5, {3, 2}), Error);
  CHECK_THROWS(cluster(rows, 4, 1.5, {2, 2}), Error);
}

TEST(shape) {
  const LshShape shape = lsh_shape(128, 0.8);
  CHECK(shape.bands == 9 && shape.rows == 13);
  CHECK_THROWS(lsh_shape(0, 0.5), Error);
}

TEST_MAIN()
