// Units and shingles of texts: what the similarity of two texts is made of. A shingle is n consecutive units.
// Everything is integer arithmetic on little-endian words: the same bits on every instruction set.
//
// Units. ASCII capitals count as small letters.
//   words       maximal runs of a-z 0-9 _ and characters outside ASCII, of which spaces, punctuation and symbols
//               separate words as those of ASCII do, and characters of scripts written without spaces (Han, kana, Thai,
//               Lao, Khmer, Burmese) are a word each (cpu/word_chars.h; for Han so UAX #29, BERT's tokenizer). What
//               lies between words is ignored; bytes that are no UTF-8 are parts of words
//   characters  code points; a run of ASCII white space is one space, and none stands at either end
//   tokens      the low 32 bits of each token id (32-bit hashes only)
// A text with fewer than n units has one shingle, all of it; a text with none has no shingle.
//
// Hashes of W = 32 bits, for signatures, or 64 bits, for exact similarities. All arithmetic modulo 2^64 or 2^W; fmix32
// and fmix64 are the finalisers of MurmurHash3.
//   word       s = 0x9E3779B97F4A7C15 * bytes; then for each 16 bytes (zero-padded) as two words lo, hi:
//              s = (s ^ lo) * 0xBF58476D1CE4E5B9;  s ^= s >> 32;  s = (s ^ hi) * 0x94D049BB133111EB;  s ^= s >> 29
//              hash = the top W bits of s
//   character  fmix(its UTF-8 lead byte followed by the low 6 bits of each continuation byte)
//   token      fmix32(id)
//   shingle    fmix(sum over k = 1..n of unit_k * m^k), m = 0x1B873593 or 0xD6E8FEB86659FD93
#pragma once

#include <cstdint>

namespace fastsft {

enum class ShingleUnit { kWord, kChar };

struct ShingleOptions {
  int64_t ngram = 5;
  ShingleUnit unit = ShingleUnit::kWord;
};

}  // namespace fastsft
