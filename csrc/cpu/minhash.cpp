// Texts are independent; each thread keeps scratch that fits the texts met so far, given back after an unusually long
// one.
#include "fastsft/minhash.h"

#include <algorithm>
#include <vector>

#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"
#include "fastsft/rng.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(int64_t, hash_words, const char* text, int64_t length, uint8_t* lower, uint32_t* edges,
                    uint32_t* units)
FASTSFT_ISA_DECLARE(int64_t, hash_chars, const char* text, int64_t length, uint32_t* units)
FASTSFT_ISA_DECLARE(int64_t, hash_shingles, const uint32_t* units, int64_t count, int64_t ngram, uint32_t* shingles)
FASTSFT_ISA_DECLARE(void, sketch, const uint32_t* shingles, int64_t n, const uint32_t* a, const uint32_t* b,
                    int64_t padded, uint32_t* signature)

namespace {

constexpr int64_t kTextsPerTask = 32;
constexpr int64_t kPad = 64;

// About 20 bytes per byte of text. Kept between calls: allocating it anew for every task took longer than the hashing.
class Scratch {
 public:
  std::vector<uint8_t> lower;
  std::vector<uint32_t> edges, units, shingles;

  void fit(int64_t length) {
    if (length <= longest_) return;
    resize(length + length / 2);
  }

  void release_if_large() {
    if (longest_ <= kKept) return;
    *this = Scratch();
  }

 private:
  static constexpr int64_t kKept = int64_t{1} << 20;

  void resize(int64_t length) {
    longest_ = length;
    const std::size_t room = static_cast<std::size_t>(length) + 128;  // the kernels write a little past the text
    lower.resize(room);
    edges.resize(room);
    units.resize(room);
    shingles.resize(room);
  }

  int64_t longest_ = -1;
};

}  // namespace

void minhash_signatures(const std::string_view* texts, int64_t n, const MinHashOptions& options, uint32_t* signatures) {
  const int64_t num_perm = options.num_perm;
  FASTSFT_CHECK(num_perm >= 1, "minhash_signatures: num_perm: expected >= 1, got ", num_perm);
  FASTSFT_CHECK(options.ngram >= 1, "minhash_signatures: ngram: expected >= 1, got ", options.ngram);
  for (int64_t i = 0; i < n; ++i) {
    FASTSFT_CHECK(texts[i].size() < 0xFFFFFFC0u, "minhash_signatures: texts[", i, "]: expected fewer than 2^32 - 64 ",
                  "bytes, got ", texts[i].size());
  }
  const int64_t padded = (num_perm + kPad - 1) / kPad * kPad;
  std::vector<uint32_t> a(padded), b(padded);
  for (int64_t j = 0; j < padded; ++j) {
    const Philox4 random = philox(options.seed, kMinHashStream, static_cast<uint64_t>(j));
    a[j] = random.x[0] | 1;
    b[j] = random.x[1];
  }
  const auto words = FASTSFT_ISA_SELECT(hash_words);
  const auto chars = FASTSFT_ISA_SELECT(hash_chars);
  const auto shingles = FASTSFT_ISA_SELECT(hash_shingles);
  const auto reduce = FASTSFT_ISA_SELECT(sketch);
  parallel_for(n, kTextsPerTask, [&](int64_t begin, int64_t end) {
    static thread_local Scratch s;
    std::vector<uint32_t> signature(padded);
    for (int64_t i = begin; i < end; ++i) {
      const std::string_view text = texts[i];
      const int64_t length = static_cast<int64_t>(text.size());
      s.fit(length);
      const int64_t units = options.unit == ShingleUnit::kWord
                                ? words(text.data(), length, s.lower.data(), s.edges.data(), s.units.data())
                                : chars(text.data(), length, s.units.data());
      const int64_t count = units == 0 ? 0 : shingles(s.units.data(), units, options.ngram, s.shingles.data());
      reduce(s.shingles.data(), count, a.data(), b.data(), padded, signature.data());
      std::copy_n(signature.begin(), num_perm, signatures + i * num_perm);
    }
    s.release_if_large();
  });
}

}  // namespace fastsft
