// N-grams of words that texts share with references: which training texts contain evaluation instances, and how much
// of each.
//
// Words are those of shingles.h: ASCII capitals count as small letters, what lies between words is ignored. An n-gram
// is n consecutive words of one text; a text with fewer has none. A shared n-gram is one whose words are equal, byte by
// byte: hashes only find candidates, each of which is compared, so that no collision, accidental or made on purpose,
// counts. Everything is exact and independent of the order of the texts, the number of threads and the instruction set.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "fastsft/common.h"

namespace fastsft {

// Every n-gram of the references, for each n. Does not keep the texts it was made of.
class NgramIndex {
 public:
  // ngrams: ascending, each >= 1. Throws Error otherwise, for a reference of 2^32 - 64 bytes or more and for 2^32 - 1
  // words or more in all.
  NgramIndex(const std::string_view* references, int64_t n, std::vector<int64_t> ngrams);
  ~NgramIndex();

  const std::vector<int64_t>& ngrams() const { return ngrams_; }
  int64_t size() const { return static_cast<int64_t>(num_words_.size()); }
  const std::vector<int64_t>& num_words() const { return num_words_; }  // of each reference

  struct Tables;
  const Tables& tables() const { return *tables_; }

 private:
  std::vector<int64_t> ngrams_;
  std::vector<int64_t> num_words_;
  std::unique_ptr<const Tables> tables_;
};

// What one text shares with one reference in n-grams of one n.
struct Shared {
  int64_t ngrams = 0;          // positions of the reference whose n-gram occurs in the text
  int64_t words = 0;           // words of the reference that lie in such n-grams
  int64_t begin = 0, end = 0;  // bytes of the reference: its longest passage, the first of several, all of whose
                               // n-grams occur in the text
};

// M pairs, in ascending order of text, then of reference.
struct Overlaps {
  std::vector<int64_t> pairs;  // [M, 2]: text, reference
  std::vector<Shared> shared;  // [M, K], K the number of n
  std::vector<uint8_t> found;  // [R]: 1 for a reference of which some text shares as much as was asked for
};

// All pairs that share an n-gram of the smallest n. With `above` [K], a share in [0, 1) for each n: of each text only
// the pair with the largest share, the first of several, among those where for some n more than that share of the
// reference's words is covered. Then the result is bounded by texts + R, however many references begin with one header.
//
// Throws Error for a text of 2^32 - 64 bytes or more, and for `above` of another length. Scratch per thread: a few
// times the longest text, and up to 12 bytes for each n-gram of the index that one text shares.
Overlaps ngram_overlap(const std::string_view* texts, int64_t n, const NgramIndex& index,
                       const std::vector<double>* above = nullptr);

}  // namespace fastsft
