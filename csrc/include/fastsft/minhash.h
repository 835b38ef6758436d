// MinHash signatures of texts and of token ids: Broder, "On the resemblance and containment of documents" (1997).
//
// A text is a sequence of units, a shingle is n consecutive units, and the expected share of equal positions in two
// signatures is the Jaccard similarity of the two sets of shingles. Everything here is integer arithmetic on
// little-endian words: the same bits on every instruction set and for any number of threads.
//
// Units. ASCII capitals count as small letters.
//   words       maximal runs of word bytes: a-z 0-9 _ and every byte >= 0x80 (any non-ASCII character is a letter);
//               what lies between words is ignored
//   characters  code points; a run of ASCII white space is one space, and none stands at either end
//   tokens      the low 32 bits of each token id
// A text with fewer than n units has one shingle, all of it; a text with none has no shingle and the signature
// 0xFFFFFFFF throughout.
//
// Hashes. All arithmetic modulo 2^64 or 2^32; fmix32 is the finaliser of MurmurHash3.
//   word       s = 0x9E3779B97F4A7C15 * bytes; then for each 16 bytes (zero-padded) as two words lo, hi:
//              s = (s ^ lo) * 0xBF58476D1CE4E5B9;  s ^= s >> 32;  s = (s ^ hi) * 0x94D049BB133111EB;  s ^= s >> 29
//              hash = s >> 32
//   character  fmix32(its UTF-8 lead byte followed by the low 6 bits of each continuation byte)
//   token      fmix32(id)
//   shingle    fmix32(sum over k = 1..n of unit_k * 0x1B873593^k)
//   position j of the signature: min over shingles h of a_j * h + b_j, where x = philox(seed, stream = kMinHashStream,
//              index = j), a_j = x[0] | 1, b_j = x[1]
#pragma once

#include <cstdint>
#include <string_view>

namespace fastsft {

inline constexpr uint64_t kMinHashStream = 0x4D696E48617368;  // "MinHash"

enum class ShingleUnit { kWord, kChar };

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
