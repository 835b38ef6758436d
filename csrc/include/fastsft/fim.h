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

#include <cmath>
#include <cstdint>

#include "fastsft/common.h"
#include "fastsft/rng.h"

namespace fastsft {

inline constexpr uint64_t kFimIndex = uint64_t{0x46494D} << 32;  // "FIM": apart from other users of the same seed

enum class FimMode : int8_t { kNone = 0, kPsm = 1, kSpm = 2 };

struct FimOptions {
  uint64_t seed = 0;
  double rate = 0.5;
  double spm_rate = 0.5;
  int64_t max_len = -1;  // a document that would grow beyond this many tokens stays untouched; -1: no limit
};

// x < threshold has probability `rate` for a uniform 32-bit x: never for 0, always for 1.
inline uint64_t fim_threshold(double rate, const char* name) {
  FASTSFT_CHECK(rate >= 0.0 && rate <= 1.0, "fim_permute: ", name, ": expected a number in [0, 1], got ", rate);
  return static_cast<uint64_t>(std::llround(rate * 4294967296.0));
}

struct FimDraw {
  FimMode mode;
  int64_t begin, end;  // the middle's cuts
};

// What is drawn for a document of `length` < 2^32 - 1 tokens, whatever the backend.
FASTSFT_HOST_DEVICE inline FimDraw fim_draw(uint64_t seed, uint64_t doc_id, int64_t length, uint64_t fim_below,
                                            uint64_t spm_below, int64_t max_len) {
  const Philox4 random = philox(seed, doc_id, kFimIndex);
  const uint32_t positions = static_cast<uint32_t>(length + 1);
  const int64_t x = uniform_below(random.x[2], positions), y = uniform_below(random.x[3], positions);
  const bool fits = max_len < 0 || length + 3 <= max_len;
  const bool rearranged = length > 0 && fits && random.x[0] < fim_below;
  const FimMode mode = !rearranged ? FimMode::kNone : random.x[1] < spm_below ? FimMode::kSpm : FimMode::kPsm;
  return {mode, x < y ? x : y, x < y ? y : x};
}

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

namespace cuda {

// The same on the device `stream` (a cudaStream_t) belongs to, all pointers in its memory; bit for bit the CPU's
// result. The first pass writes mode, cuts and the output length of each document, whose running sum is out_cu_seqlens,
// and sets *broken (0 before the call) where the CPU would throw for cu_seqlens or spans. Throws Error for the rates,
// and std::runtime_error for a launch that failed.
void fim_plan(const int64_t* cu_seqlens, int64_t num_docs, int64_t num_tokens, const FimOptions& options,
              const int64_t* doc_ids, const int64_t* spans, FimMode* mode, int64_t* cuts, int64_t* out_lengths,
              int32_t* broken, void* stream);

// Second pass, after a first that did not set *broken; sentinels [3] is in host memory.
template <typename Token>
void fim_copy(const Token* tokens, const int64_t* cu_seqlens, int64_t num_docs, const FimMode* mode,
              const int64_t* cuts, const int64_t* out_cu_seqlens, int64_t out_tokens_size, const Token* sentinels,
              Token* out_tokens, int64_t* source_index, void* stream);

extern template void fim_copy(const int32_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*,
                              int64_t, const int32_t*, int32_t*, int64_t*, void*);
extern template void fim_copy(const int64_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*,
                              int64_t, const int64_t*, int64_t*, int64_t*, void*);

}  // namespace cuda

}  // namespace fastsft
