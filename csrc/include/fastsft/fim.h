// Fill-in-the-middle on token ids: Bavarian et al., "Efficient training of language models to fill in the middle"
// (arXiv 2207.14255).
//
// A document of L > 0 tokens is cut at two points, each uniform on 0..L inclusive, into prefix P, middle M and suffix S
// (any of them may be empty) and becomes, with the three sentinel tokens PRE, SUF, MID,
//
//   PSM:  PRE P SUF S MID M
//   SPM:  PRE SUF S MID P M      (the paper's second variant: P and M stay contiguous)
//
// Random numbers: x = philox(seed, stream = doc_id, index = kFimIndex), so a document's cut depends on its id and the
// seed only. x[0] < rate * 2^32 decides whether it is rearranged, x[1] < spm_rate * 2^32 whether as SPM, and
// uniform_below(x[2], L + 1), uniform_below(x[3], L + 1), sorted, are the cuts.
#pragma once

#include <cstdint>

namespace fastsft {

inline constexpr uint64_t kFimIndex = uint64_t{0x46494D} << 32;  // "FIM": apart from other users of the same seed

enum class FimMode : int8_t { kNone = 0, kPsm = 1, kSpm = 2 };

struct FimOptions {
  uint64_t seed = 0;
  double rate = 0.5;
  double spm_rate = 0.5;
  int64_t max_len = -1;  // a document that would grow beyond this many tokens stays untouched; -1: no limit
};

// First pass: decides every document and returns the number of output tokens.
//   cu_seqlens [B + 1]: first 0, never decreasing, last num_tokens
//   doc_ids [B] or null (then 0..B-1)
//   spans [B, 2] or null: the middle of each document as [begin, end) within it, instead of random cuts
//   out: mode [B], cuts [B, 2] (begin and end of M within the document), out_cu_seqlens [B + 1]
// Empty documents stay untouched. Throws Error for rates outside [0, 1], broken cu_seqlens, a document of 2^32 - 1
// tokens or more, and a span outside its document.
int64_t fim_plan(const int64_t* cu_seqlens, int64_t num_docs, int64_t num_tokens, const FimOptions& options,
                 const int64_t* doc_ids, const int64_t* spans, FimMode* mode, int64_t* cuts, int64_t* out_cu_seqlens);

// Second pass: writes tokens and source_index, both [out_cu_seqlens[B]]; source_index holds the input position of each
// output token, -1 for a sentinel. sentinels = {PRE, SUF, MID}. No output may alias an input.
template <typename Token>
void fim_copy(const Token* tokens, const int64_t* cu_seqlens, int64_t num_docs, const FimMode* mode,
              const int64_t* cuts, const int64_t* out_cu_seqlens, const Token* sentinels, Token* out_tokens,
              int64_t* source_index);

extern template void fim_copy(const int32_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*,
                              const int32_t*, int32_t*, int64_t*);
extern template void fim_copy(const int64_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*,
                              const int64_t*, int64_t*, int64_t*);

}  // namespace fastsft
