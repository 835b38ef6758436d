// Texts are independent: each is hashed and reduced by one thread, in that thread's scratch.
#include "fastsft/minhash.h"

#include <algorithm>
#include <vector>

#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"
#include "fastsft/rng.h"
#include "lsh_key.h"
#include "shingler.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(void, hash_tokens32, const int32_t* tokens, int64_t count, uint32_t* units)
FASTSFT_ISA_DECLARE(void, hash_tokens64, const int64_t* tokens, int64_t count, uint32_t* units)
FASTSFT_ISA_DECLARE(void, sketch, const uint32_t* shingles, int64_t n, const uint32_t* a, const uint32_t* b,
                    int64_t padded, uint32_t* signature)

namespace {

constexpr int64_t kTextsPerTask = 32;
constexpr int64_t kPad = 64;

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

// read(i, shingler, take) hands the shingles of text i to take(shingles, count), perhaps in pieces;
// use(i, signature) gets the signature [num_perm].
template <typename Read, typename Use>
void sign_all(int64_t n, const MinHashOptions& options, const Read& read, const Use& use) {
  const Factors factors(options);
  const auto reduce = FASTSFT_ISA_SELECT(sketch);
  const int64_t padded = static_cast<int64_t>(factors.a.size());
  parallel_for(n, kTextsPerTask, [&](int64_t begin, int64_t end) {
    static thread_local Shingler<uint32_t> shingler;
    std::vector<uint32_t> signature(padded);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(signature.begin(), signature.end(), ~uint32_t{0});
      read(i, shingler, [&](const uint32_t* shingles, int64_t count) {
        reduce(shingles, count, factors.a.data(), factors.b.data(), padded, signature.data());
      });
      use(i, signature.data());
    }
    shingler.release_if_large();
  });
}

template <typename Use>
void sign_texts(const char* op, const std::string_view* texts, int64_t n, const MinHashOptions& options,
                const Use& use) {
  check_lengths(op, texts, n);
  const ShingleOptions shape{options.ngram, options.unit};
  const auto read = [&](int64_t i, Shingler<uint32_t>& shingler, const auto& take) {
    shingler.start(texts[i], shape);
    for (auto piece = shingler.next(); !piece.empty(); piece = shingler.next()) {
      take(piece.data(), static_cast<int64_t>(piece.size()));
    }
  };
  sign_all(n, options, read, use);
}

void hash_tokens(const int32_t* tokens, int64_t count, uint32_t* units) {
  FASTSFT_ISA_SELECT(hash_tokens32)(tokens, count, units);
}
void hash_tokens(const int64_t* tokens, int64_t count, uint32_t* units) {
  FASTSFT_ISA_SELECT(hash_tokens64)(tokens, count, units);
}

}  // namespace

void minhash_signatures(const std::string_view* texts, int64_t n, const MinHashOptions& options, uint32_t* signatures) {
  sign_texts("minhash_signatures", texts, n, options, [&](int64_t i, const uint32_t* signature) {
    std::copy_n(signature, options.num_perm, signatures + i * options.num_perm);
  });
}

void minhash_lsh_keys(const std::string_view* texts, int64_t n, const MinHashOptions& options, LshShape shape,
                      int64_t* keys) {
  check_shape("minhash_lsh_keys", shape, options.num_perm);
  sign_texts("minhash_lsh_keys", texts, n, options, [&](int64_t i, const uint32_t* signature) {
    for (int64_t b = 0; b < shape.bands; ++b) keys[b * n + i] = lsh_key(signature + b * shape.rows, shape.rows);
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
  sign_all(
      n, options,
      [&](int64_t i, Shingler<uint32_t>& shingler, const auto& take) {
        const int64_t count = cu_seqlens[i + 1] - cu_seqlens[i];
        shingler.fit(count);
        hash_tokens(tokens + cu_seqlens[i], count, shingler.units());
        take(shingler.shingles(), shingler.read_units(count, options.ngram));
      },
      [&](int64_t i, const uint32_t* signature) {
        std::copy_n(signature, options.num_perm, signatures + i * options.num_perm);
      });
}

template void minhash_token_signatures(const int32_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                       uint32_t*);
template void minhash_token_signatures(const int64_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                       uint32_t*);

}  // namespace fastsft
