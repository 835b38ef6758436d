// Traffic per token: the token read and written once (4 or 8 bytes each) and 8 bytes of source index written; one
// Philox block per document. Copies run at memory speed, so there is no per-ISA version.
#include "fastsft/fim.h"

#include <algorithm>

#include "fastsft/common.h"
#include "fastsft/parallel.h"

namespace fastsft {
namespace {

constexpr int64_t kDocsPerTask = 64;

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
  const uint64_t fim_below = fim_threshold(options.rate, "rate");
  const uint64_t spm_below = fim_threshold(options.spm_rate, "spm_rate");
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
      FimDraw draw = fim_draw(options.seed, static_cast<uint64_t>(doc_ids ? doc_ids[b] : b), length, fim_below,
                              spm_below, options.max_len);
      if (spans != nullptr) {
        draw.begin = spans[2 * b];
        draw.end = spans[2 * b + 1];
        FASTSFT_CHECK(0 <= draw.begin && draw.begin <= draw.end && draw.end <= length,
                      "fim_permute: spans: expected 0 <= begin <= end <= ", length, " at document ", b, ", got [",
                      draw.begin, ", ", draw.end, ")");
      }
      mode[b] = draw.mode;
      cuts[2 * b] = draw.begin;
      cuts[2 * b + 1] = draw.end;
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
