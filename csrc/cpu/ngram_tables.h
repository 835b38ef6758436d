// Private to csrc/cpu: the words of the references and, for each n, a hash table of their distinct n-grams.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "fastsft/overlap.h"
#include "shingler.h"

namespace fastsft {

inline constexpr uint32_t kNoGram = 0xFFFFFFFFu;

// The n-grams of one n. Distinct ones are numbered.
struct NgramLevel {
  int64_t n;
  std::vector<uint32_t> places;  // words at which an n-gram begins, n-gram by n-gram, ascending within each
  std::vector<uint32_t> first;   // [number of n-grams + 1]: where each one's places begin
  std::vector<uint64_t> hashes;  // [number of n-grams]
  std::vector<uint32_t> slots;   // open addressing, at most half full: n-gram + 1, or 0
  std::vector<uint64_t> filter;  // for each n-gram three bits of one of its words

  bool may_have(uint64_t hash) const {
    const uint64_t wanted = filter_bits(hash);
    return (filter[hash & (filter.size() - 1)] & wanted) == wanted;
  }

  // The n-gram at word i of the text that the shingler has read, or kNoGram.
  uint32_t find(uint64_t hash, const Shingler<uint64_t>& text, int64_t i, const NgramIndex::Tables& tables) const;

  static uint64_t filter_bits(uint64_t hash) {
    return uint64_t{1} << (hash >> 58) | uint64_t{1} << (hash >> 52 & 63) | uint64_t{1} << (hash >> 46 & 63);
  }

  void add_slots();  // from hashes
};

struct NgramIndex::Tables {
  std::vector<char> letters;         // the words, in small letters, one behind the other
  std::vector<int64_t> word_at;      // [W + 1]: where each word begins in letters
  std::vector<uint32_t> word_begin;  // [W]: its bytes in its reference
  std::vector<uint32_t> word_end;    // [W]
  std::vector<uint32_t> first_word;  // [references + 1]
  std::vector<NgramLevel> levels;    // by ascending n

  std::string_view word(uint32_t w) const {
    return {letters.data() + word_at[w], static_cast<std::size_t>(word_at[w + 1] - word_at[w])};
  }
  int64_t reference_of(uint32_t word) const;
};

}  // namespace fastsft
