// Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2's bytes as symbols): the ids that the tokenizer itself
// gives a text, natively and on short pieces of it.
//
// A text is split into pretokens by one of the regular expressions below, and each pretoken, a string of bytes, is
// merged on its own: the adjacent pair of lowest rank first, the leftmost of several.
//
//   GPT-2        's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   GPT-4 style  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,max_digits}
//                | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//
// In both, a letter followed by anything but a letter ends a pretoken, and no pretoken that ends before such a place
// depends on more than the one character behind it. That is what lets a cut be re-encoded by a window (fim_rows.h).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fastsft {

enum class BpePattern : int8_t { kGpt2 = 0, kGpt4 = 1 };

struct BpeSplit {
  BpePattern pattern = BpePattern::kGpt2;
  int32_t max_digits = 1;      // GPT-4 style: numbers are split after so many characters
  bool digits_apart = false;   // StarCoder: each digit stands alone, before the pattern is applied
  bool ignore_merges = false;  // Llama 3: a pretoken that is a token is that token
};

// Properties of a character, as the regular expressions' engine sees them. A character without kKnown stops the
// encoder, so that properties may be looked up as they are met.
struct CharClass {
  static constexpr uint8_t kLetter = 1, kNumber = 2, kSpace = 4, kDigit = 8, kKnown = 128;
};

inline constexpr int64_t kCodePoints = 0x110000;
inline constexpr int64_t kMaxPretoken = 2048;  // bytes; merging takes time in the square of them

// Ids of short pretokens met before, of one vocabulary: texts repeat theirs, source code most of all. For one thread.
class BpeCache {
 public:
  static constexpr std::size_t kBytes = 15, kIds = 5;
  struct Entry {
    uint64_t key[2];  // the bytes, zeros, and their number in the last byte: 0 is no pretoken
    int32_t ids[kIds], count;
  };
  Entry& entry(const uint64_t key[2]) {
    return entries_[((key[0] ^ key[1] * 0x9FB21C651E98DF25u) * 0x9E3779B97F4A7C15u) >> (64 - kBits)];
  }

 private:
  static constexpr int kBits = 13;  // 320 KiB, in the second cache
  std::vector<Entry> entries_ = std::vector<Entry>(std::size_t{1} << kBits);
};

class ByteBpe {
 public:
  // token_bytes: the bytes of every id, empty for one that is no plain piece of text. merges [M, 3]: left id, right id
  // and the id of both, in order of rank. classes [kCodePoints]: CharClass of every code point; not copied, and may
  // gain kKnown entries between calls. Throws Error if a byte has no token of its own or an id is out of range.
  ByteBpe(std::vector<std::string> token_bytes, const int32_t* merges, int64_t num_merges, const uint8_t* classes,
          const BpeSplit& split);
  ByteBpe(const ByteBpe&) = delete;  // pieces are looked up by views into its own bytes
  ByteBpe& operator=(const ByteBpe&) = delete;

  // Appends the ids of `text`. False if it holds a character of unknown class (appended to `unknown`) or a pretoken
  // longer than kMaxPretoken; `out` is then as it was, but for its capacity. `cache`, or null: of this vocabulary.
  bool encode(std::string_view text, std::vector<int32_t>& out, std::vector<uint32_t>& unknown,
              BpeCache* cache = nullptr) const;

  // The bytes of an id; empty for one that is no plain piece of text.
  std::string_view bytes_of(int64_t id) const {
    if (id < 0 || id >= static_cast<int64_t>(starts_.size()) - 1) return {};
    return {bytes_.data() + starts_[id], static_cast<std::size_t>(starts_[id + 1] - starts_[id])};
  }

  // The text of n ids, and the byte at which each begins with the text's length behind them. False if an id is no plain
  // piece of text; `text` is then unspecified.
  template <typename Token>
  bool decode(const Token* ids, int64_t n, std::string& text, std::vector<int64_t>& starts) const;

  // The character at text[at], its length in bytes to *length. A byte that is no part of valid UTF-8 is a character by
  // itself, neither letter nor number nor space.
  uint8_t class_at(std::string_view text, std::size_t at, int* length) const;

  // The last place in (begin, end), or `begin`, that surely lies between two pretokens of text[begin : ], whatever
  // follows text[end - 1]; and the first in (begin, end), or `end`, that lies between two of every text that ends as
  // text[begin : ] does.
  std::size_t seam_before(std::string_view text, std::size_t begin, std::size_t end) const;
  std::size_t seam_after(std::string_view text, std::size_t begin, std::size_t end) const;

 private:
  struct Merge {
    uint64_t pair;
    int32_t rank, id;
  };

  std::size_t pretoken_end(std::string_view text, std::size_t begin, std::vector<uint32_t>& unknown) const;
  void merge(std::string_view pretoken, std::vector<int32_t>& out) const;
  void merge(std::string_view pretoken, std::vector<int32_t>& out, BpeCache& cache) const;
  const Merge* find(int32_t left, int32_t right) const;

  std::string bytes_;  // of every id, one after the other, and padding for copies of a fixed size
  std::vector<int64_t> starts_;
  std::vector<Merge> table_;  // open addressing; rank < 0: free
  uint64_t mask_ = 0;
  int32_t byte_ids_[256];
  std::unordered_map<std::string_view, int32_t> whole_;  // for ignore_merges
  const uint8_t* classes_;
  BpeSplit split_;
};

extern template bool ByteBpe::decode(const int32_t*, int64_t, std::string&, std::vector<int64_t>&) const;
extern template bool ByteBpe::decode(const int64_t*, int64_t, std::string&, std::vector<int64_t>&) const;

}  // namespace fastsft
