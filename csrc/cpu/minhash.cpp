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
FASTSFT_ISA_DECLARE(void, hash_tokens32, const int32_t* tokens, int64_t count, uint32_t* units)
FASTSFT_ISA_DECLARE(void, hash_tokens64, const int64_t* tokens, int64_t count, uint32_t* units)
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

// The factors of the hash functions, padded to whole vectors.
struct Factors {
  std::vector<uint32_t> a, b;

  explicit Factors(const MinHashOptions& options) {
    FASTSFT_CHECK(options.num_perm >= 1, "minhash_signatures: num_perm: expected >= 1, got ", options.num_perm);
    FASTSFT_CHECK(options.ngram >= 1, "minhash_signatures: ngram: expected >= 1, got ", options.ngram);
    const int64_t padded = (options.num_perm + kPad - 1) / kPad * kPad;
    for (int64_t j = 0; j < padded; ++j) {
      const Philox4 random = philox(options.seed, kMinHashStream, static_cast<uint64_t>(j));
      a.push_back(random.x[0] | 1);
      b.push_back(random.x[1]);
    }
  }
};

// hash_units(i, scratch) fits the scratch to text i, writes its hashed units there and returns their number.
template <typename HashUnits>
void sign_all(int64_t n, const MinHashOptions& options, uint32_t* signatures, const HashUnits& hash_units) {
  const Factors factors(options);
  const auto shingles = FASTSFT_ISA_SELECT(hash_shingles);
  const auto reduce = FASTSFT_ISA_SELECT(sketch);
  const int64_t padded = static_cast<int64_t>(factors.a.size());
  parallel_for(n, kTextsPerTask, [&](int64_t begin, int64_t end) {
    static thread_local Scratch s;
    std::vector<uint32_t> signature(padded);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t units = hash_units(i, s);
      const int64_t count = units == 0 ? 0 : shingles(s.units.data(), units, options.ngram, s.shingles.data());
      reduce(s.shingles.data(), count, factors.a.data(), factors.b.data(), padded, signature.data());
      std::copy_n(signature.begin(), options.num_perm, signatures + i * options.num_perm);
    }
    s.release_if_large();
  });
}

void hash_tokens(const int32_t* tokens, int64_t count, uint32_t* units) {
  FASTSFT_ISA_SELECT(hash_tokens32)(tokens, count, units);
}
void hash_tokens(const int64_t* tokens, int64_t count, uint32_t* units) {
  FASTSFT_ISA_SELECT(hash_tokens64)(tokens, count, units);
}

}  // namespace

void minhash_signatures(const std::string_view* texts, int64_t n, const MinHashOptions& options, uint32_t* signatures) {
  for (int64_t i = 0; i < n; ++i) {
    FASTSFT_CHECK(texts[i].size() < 0xFFFFFFC0u, "minhash_signatures: texts[", i, "]: expected fewer than 2^32 - 64 ",
                  "bytes, got ", texts[i].size());
  }
  const auto words = FASTSFT_ISA_SELECT(hash_words);
  const auto chars = FASTSFT_ISA_SELECT(hash_chars);
  sign_all(n, options, signatures, [&](int64_t i, Scratch& s) {
    const char* text = texts[i].data();
    const int64_t length = static_cast<int64_t>(texts[i].size());
    s.fit(length);
    return options.unit == ShingleUnit::kWord ? words(text, length, s.lower.data(), s.edges.data(), s.units.data())
                                              : chars(text, length, s.units.data());
  });
}

template <typename Token>
void minhash_token_signatures(const Token* tokens, int64_t num_tokens, const int64_t* cu_seqlens, int64_t n,
                              const MinHashOptions& options, uint32_t* signatures) {
  FASTSFT_CHECK(cu_seqlens[0] == 0 && cu_seqlens[n] == num_tokens,
                "minhash_token_signatures: cu_seqlens: expected offsets from 0 to the ", num_tokens,
                " tokens given, got ", cu_seqlens[0], " to ", cu_seqlens[n]);
  for (int64_t i = 0; i < n; ++i) {
    FASTSFT_CHECK(cu_seqlens[i] <= cu_seqlens[i + 1],
                  "minhash_token_signatures: cu_seqlens: expected never to decrease, got ", cu_seqlens[i], " then ",
                  cu_seqlens[i + 1], " at text ", i);
  }
  sign_all(n, options, signatures, [&](int64_t i, Scratch& s) {
    const int64_t count = cu_seqlens[i + 1] - cu_seqlens[i];
    s.fit(count);
    hash_tokens(tokens + cu_seqlens[i], count, s.units.data());
    return count;
  });
}

template void minhash_token_signatures(const int32_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                       uint32_t*);
template void minhash_token_signatures(const int64_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                       uint32_t*);

}  // namespace fastsft
