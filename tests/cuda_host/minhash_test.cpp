// csrc/cuda/minhash.cu in the emulator: bit for bit the CPU's signatures.
#include "fastsft/minhash.h"

#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

struct Texts {
  std::vector<int32_t> tokens;
  std::vector<int64_t> cu{0};

  explicit Texts(const std::vector<int>& lengths) {
    for (int n : lengths) {
      for (int i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(philox(2, cu.size(), i).x[0] % 100 - 7));
      cu.push_back(static_cast<int64_t>(tokens.size()));
    }
    tokens.shrink_to_fit();
  }
  int64_t n() const { return static_cast<int64_t>(cu.size()) - 1; }
  int64_t total() const { return static_cast<int64_t>(tokens.size()); }
};

void compare(const Texts& texts, const MinHashOptions& options) {
  std::vector<uint32_t> expected(texts.n() * options.num_perm), got(expected.size(), 7), wide(expected.size(), 7);
  minhash_token_signatures(texts.tokens.data(), texts.total(), texts.cu.data(), texts.n(), options, expected.data());
  cuda::minhash_token_signatures(texts.tokens.data(), texts.total(), texts.cu.data(), texts.n(), options, got.data(),
                                 nullptr);
  CHECK(got == expected);
  const std::vector<int64_t> ids(texts.tokens.begin(), texts.tokens.end());
  cuda::minhash_token_signatures(ids.data(), texts.total(), texts.cu.data(), texts.n(), options, wide.data(), nullptr);
  CHECK(wide == expected);
}

const std::vector<int> kMixed{0, 1, 4, 5, 6, 0, 0, 511, 3, 513, 0, 1, 700, 2, 0};

}  // namespace

TEST(bits_of_the_cpu) {
  for (const MinHashOptions& options :
       {MinHashOptions{}, MinHashOptions{.num_perm = 1, .ngram = 1},
        MinHashOptions{.num_perm = 70, .ngram = 3, .seed = 9}, MinHashOptions{.num_perm = 200, .ngram = 13},
        MinHashOptions{.num_perm = 3, .ngram = 600}}) {
    compare(Texts(kMixed), options);
  }
  compare(Texts({}), {});
  compare(Texts({0, 0}), {});
  compare(Texts({5}), {});
}

TEST(documents_across_blocks) {
  compare(Texts({2040, 30, 5000, 1, 2048}), {});
  compare(Texts({2047, 3, 2046, 2, 4}), {.ngram = 5});
}

TEST(broken_offsets_touch_nothing_else) {
  for (int64_t offset : {int64_t{-9}, int64_t{10'000}, INT64_MIN, INT64_MAX}) {
    for (int at : {0, 3, 9}) {
      Texts texts(kMixed);
      texts.cu[at] = offset;
      std::vector<uint32_t> out(texts.n() * 128);
      cuda::minhash_token_signatures(texts.tokens.data(), texts.total(), texts.cu.data(), texts.n(), {}, out.data(),
                                     nullptr);
    }
  }
}

TEST(errors) {
  const Texts texts({5});
  std::vector<uint32_t> out(128);
  for (const MinHashOptions& options :
       {MinHashOptions{.num_perm = 0}, MinHashOptions{.ngram = 0}, MinHashOptions{.ngram = 4097}}) {
    CHECK_THROWS(
        cuda::minhash_token_signatures(texts.tokens.data(), 5, texts.cu.data(), 1, options, out.data(), nullptr),
        Error);
  }
}

TEST_MAIN()
