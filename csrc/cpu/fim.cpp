// Traffic per token: the token read and written once (4 or 8 bytes each) and 8 bytes of source index written; one
// Philox block per document. Copies run at memory speed, so there is no per-ISA version.
#include "fastsft/fim.h"

#include <algorithm>
#include <cmath>

#include "fastsft/common.h"
#include "fastsft/parallel.h"
#include "fastsft/rng.h"

namespace fastsft {
namespace {

constexpr int64_t kDocsPerTask = 64;

// x < threshold has probability `rate` for a uniform 32-bit x: never for 0, always for 1.
uint64_t threshold_of(double rate, const char* name) {
  FASTSFT_CHECK(rate >= 0.0 && rate <= 1.0, "fim_permute: ", name, ": expected a number in [0, 1], got ", rate);
  return static_cast<uint64_t>(std::llround(rate * 4294967296.0));
}

// One document's output, written front to back.
template <typename Token>
struct Writer {
  const Token* tokens;
  Token* out;
  int64_t* source;

  void sentinel(Token id) {
    *out++ = id;
    *source++ = -1;
  }

  void copy(int64_t begin, int64_t end) {
    out = std::copy(tokens + begin, tokens + end, out);
    for (int64_t i = begin; i < end; ++i) *source++ = i;
  }
};

}  // namespace

int64_t fim_plan(const int64_t* cu_seqlens, int64_t num_docs, int64_t num_tokens, const FimOptions& options,
                 const int64_t* doc_ids, const int64_t* spans, FimMode* mode, int64_t* cuts, int64_t* out_cu_seqlens) {
  const uint64_t fim_below = threshold_of(options.rate, "rate");
  const uint64_t spm_below = threshold_of(options.spm_rate, "spm_rate");
  FASTSFT_CHECK(cu_seqlens[0] == 0, "fim_permute: cu_seqlens: expected to start with 0, got ", cu_seqlens[0]);
  FASTSFT_CHECK(cu_seqlens[num_docs] == num_tokens, "fim_permute: cu_seqlens: expected to end with the ", num_tokens,
                " tokens given, got ", cu_seqlens[num_docs]);
  parallel_for(num_docs, kDocsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t length = cu_seqlens[b + 1] - cu_seqlens[b];
      FASTSFT_CHECK(length >= 0, "fim_permute: cu_seqlens: expected never to decrease, got ", cu_seqlens[b], " then ",
                    cu_seqlens[b + 1], " at document ", b);
      FASTSFT_CHECK(length < 0xFFFFFFFF, "fim_permute: cu_seqlens: expected documents of fewer than 2^32 - 1 tokens, ",
                    "got ", length, " at document ", b);
      const Philox4 random = philox(options.seed, static_cast<uint64_t>(doc_ids ? doc_ids[b] : b), kFimIndex);
      const uint32_t positions = static_cast<uint32_t>(length + 1);
      int64_t begin = uniform_below(random.x[2], positions);
      int64_t end = uniform_below(random.x[3], positions);
      if (begin > end) std::swap(begin, end);
      if (spans != nullptr) {
        begin = spans[2 * b];
        end = spans[2 * b + 1];
        FASTSFT_CHECK(0 <= begin && begin <= end && end <= length,
                      "fim_permute: spans: expected 0 <= begin <= end <= ", length, " at document ", b, ", got [",
                      begin, ", ", end, ")");
      }
      const bool fits = options.max_len < 0 || length + 3 <= options.max_len;
      const bool rearranged = length > 0 && fits && random.x[0] < fim_below;
      mode[b] = !rearranged ? FimMode::kNone : random.x[1] < spm_below ? FimMode::kSpm : FimMode::kPsm;
      cuts[2 * b] = begin;
      cuts[2 * b + 1] = end;
    }
  });
  out_cu_seqlens[0] = 0;
  for (int64_t b = 0; b < num_docs; ++b) {
    const int64_t length = cu_seqlens[b + 1] - cu_seqlens[b];
    out_cu_seqlens[b + 1] = out_cu_seqlens[b] + length + (mode[b] == FimMode::kNone ? 0 : 3);
  }
  return out_cu_seqlens[num_docs];
}

template <typename Token>
void fim_copy(const Token* tokens, const int64_t* cu_seqlens, int64_t num_docs, const FimMode* mode,
              const int64_t* cuts, const int64_t* out_cu_seqlens, const Token* sentinels, Token* out_tokens,
              int64_t* source_index) {
  const Token prefix = sentinels[0], suffix = sentinels[1], middle = sentinels[2];
  parallel_for(num_docs, kDocsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
      const int64_t m0 = begin + cuts[2 * b], m1 = begin + cuts[2 * b + 1];
      Writer<Token> write{tokens, out_tokens + out_cu_seqlens[b], source_index + out_cu_seqlens[b]};
      switch (mode[b]) {
        case FimMode::kNone: write.copy(begin, end); break;
        case FimMode::kPsm:
          write.sentinel(prefix);
          write.copy(begin, m0);
          write.sentinel(suffix);
          write.copy(m1, end);
          write.sentinel(middle);
          write.copy(m0, m1);
          break;
        case FimMode::kSpm:
          write.sentinel(prefix);
          write.sentinel(suffix);
          write.copy(m1, end);
          write.sentinel(middle);
          write.copy(begin, m1);
          break;
      }
    }
  });
}

template void fim_copy(const int32_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*,
                       const int32_t*, int32_t*, int64_t*);
template void fim_copy(const int64_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*,
                       const int64_t*, int64_t*, int64_t*);

}  // namespace fastsft
