// MinHash signatures of texts and of token ids: Broder, "On the resemblance and containment of documents" (1997).
//
// The expected share of equal positions in the signatures of two texts is the Jaccard similarity of their sets of
// shingles (shingles.h, hashes of 32 bits). Integer arithmetic: the same bits on every instruction set and for any
// number of threads.
//   position j of the signature: min over shingles h of a_j * h + b_j modulo 2^32, where x = philox(seed, stream =
//              kMinHashStream, index = j), a_j = x[0] | 1, b_j = x[1]
// A text without shingles has the signature 0xFFFFFFFF throughout.
#pragma once

#include <cstdint>
#include <string_view>

#include "fastsft/shingles.h"

namespace fastsft {

inline constexpr uint64_t kMinHashStream = 0x4D696E48617368;  // "MinHash"

struct MinHashOptions {
  int64_t num_perm = 128;
  int64_t ngram = 5;
  ShingleUnit unit = ShingleUnit::kWord;
  uint64_t seed = 0;
};

// texts [n] in UTF-8 (any bytes are safe); signatures [n, num_perm] is written. Throws Error for num_perm or ngram < 1
// and for a text of 2^32 - 64 bytes or more.
void minhash_signatures(const std::string_view* texts, int64_t n, const MinHashOptions& options, uint32_t* signatures);

// Text i is tokens [cu_seqlens[i], cu_seqlens[i + 1]); cu_seqlens [n + 1] ascends from 0 to num_tokens. options.unit
// plays no part. Throws Error for num_perm or ngram < 1 and for broken cu_seqlens.
template <typename Token>
void minhash_token_signatures(const Token* tokens, int64_t num_tokens, const int64_t* cu_seqlens, int64_t n,
                              const MinHashOptions& options, uint32_t* signatures);

extern template void minhash_token_signatures(const int32_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                              uint32_t*);
extern template void minhash_token_signatures(const int64_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                              uint32_t*);

namespace cuda {

inline constexpr int64_t kMaxNgram = 4096;

// The same on the device `stream` (a cudaStream_t) belongs to, all pointers in its memory: starts kernels only, and the
// bits are the CPU's. cu_seqlens are not checked: where they are broken, the signatures are unspecified, but nothing
// outside the arguments is read or written. Throws Error for num_perm < 1, an ngram outside [1, kMaxNgram] and
// num_tokens of 2^42 or more, and std::runtime_error for a launch that failed.
template <typename Token>
void minhash_token_signatures(const Token* tokens, int64_t num_tokens, const int64_t* cu_seqlens, int64_t n,
                              const MinHashOptions& options, uint32_t* signatures, void* stream);

extern template void minhash_token_signatures(const int32_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                              uint32_t*, void*);
extern template void minhash_token_signatures(const int64_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                              uint32_t*, void*);

}  // namespace cuda

}  // namespace fastsft
