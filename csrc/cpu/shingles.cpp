// Chooses the instruction set's kernels and keeps their scratch.
#include "fastsft/shingles.h"

#include <algorithm>

#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "shingler.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(int64_t, hash_words32, const char* text, int64_t length, uint8_t* lower, uint32_t* edges,
                    uint32_t* units)
FASTSFT_ISA_DECLARE(int64_t, hash_words64, const char* text, int64_t length, uint8_t* lower, uint32_t* edges,
                    uint64_t* units)
FASTSFT_ISA_DECLARE(int64_t, hash_chars32, const char* text, int64_t length, uint32_t* units)
FASTSFT_ISA_DECLARE(int64_t, hash_chars64, const char* text, int64_t length, uint64_t* units)
FASTSFT_ISA_DECLARE(int64_t, hash_shingles32, const uint32_t* units, int64_t count, int64_t ngram, uint32_t* shingles)
FASTSFT_ISA_DECLARE(int64_t, hash_shingles64, const uint64_t* units, int64_t count, int64_t ngram, uint64_t* shingles)

namespace {

constexpr std::size_t kPieceBytes = std::size_t{1} << 19;

template <typename Hash>
constexpr bool kNarrow = sizeof(Hash) == 4;

bool is_word(unsigned char c) {
  return c >= 0x80 || c == '_' || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}
bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_continuation(unsigned char c) { return (c & 0xC0) == 0x80; }

// A piece of a text and where the next one begins. No word is cut. With characters the last one of a piece, no space,
// is the first of the next too, so that a space behind it is known to be one between characters.
struct Piece {
  std::size_t end, next;
};

Piece first_piece(std::string_view text, ShingleUnit unit) {
  std::size_t at = kPieceBytes;
  if (unit == ShingleUnit::kWord) {
    while (at < text.size() && is_word(static_cast<unsigned char>(text[at]))) ++at;
    at = std::min(at, text.size());
    return {at, at};
  }
  const auto starts = [](unsigned char c) { return !is_space(c) && !is_continuation(c); };
  while (at < text.size() && !starts(static_cast<unsigned char>(text[at]))) ++at;
  if (at >= text.size()) return {text.size(), text.size()};
  std::size_t end = at + 1;
  while (end < text.size() && is_continuation(static_cast<unsigned char>(text[end]))) ++end;
  return {end, at};
}

}  // namespace

void check_lengths(const char* op, const std::string_view* texts, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    FASTSFT_CHECK(texts[i].size() < 0xFFFFFFC0u, op, ": texts[", i, "]: expected fewer than 2^32 - 64 bytes, got ",
                  texts[i].size());
  }
}

template <typename Hash>
int64_t Shingler<Hash>::hash_units(std::string_view text, ShingleUnit unit, Hash* units) {
  const char* data = text.data();
  const int64_t length = static_cast<int64_t>(text.size());
  if (unit == ShingleUnit::kWord) {
    if constexpr (kNarrow<Hash>) {
      return FASTSFT_ISA_SELECT(hash_words32)(data, length, lower_.get(), edges_.get(), units);
    } else {
      return FASTSFT_ISA_SELECT(hash_words64)(data, length, lower_.get(), edges_.get(), units);
    }
  } else {
    if constexpr (kNarrow<Hash>) {
      return FASTSFT_ISA_SELECT(hash_chars32)(data, length, units);
    } else {
      return FASTSFT_ISA_SELECT(hash_chars64)(data, length, units);
    }
  }
}

template <typename Hash>
int64_t Shingler<Hash>::read(std::string_view text, const ShingleOptions& options) {
  fit(static_cast<int64_t>(text.size()));
  num_units_ = hash_units(text, options.unit, units());
  return read_units(num_units_, options.ngram);
}

template <typename Hash>
void Shingler<Hash>::start(std::string_view text, const ShingleOptions& options) {
  rest_ = text;
  options_ = options;
  tail_.clear();
  repeats_ = any_ = done_ = false;
}

template <typename Hash>
std::span<const Hash> Shingler<Hash>::next() {
  while (!done_) {
    const Piece piece = first_piece(rest_, options_.unit);
    const int64_t carried = static_cast<int64_t>(tail_.size());
    fit(carried + 1 + static_cast<int64_t>(piece.end));
    Hash* units = units_.get() + 1;  // before them, where nothing is carried, the unit that is repeated
    std::copy(tail_.begin(), tail_.end(), units);
    const int64_t kept = carried - repeats_;
    const int64_t count = kept + hash_units(rest_.substr(0, piece.end), options_.unit, units + kept);
    done_ = piece.end == rest_.size();
    rest_.remove_prefix(piece.next);
    repeats_ = options_.unit == ShingleUnit::kChar;
    if (count < options_.ngram && (any_ || !done_ || count == 0)) {
      tail_.assign(units, units + count);
      continue;
    }
    const int64_t shingles = hash_shingles(units, count, options_.ngram);
    any_ = true;
    if (!done_) tail_.assign(units + (count - options_.ngram + 1), units + count);
    return {shingles_.get(), static_cast<std::size_t>(shingles)};
  }
  return {};
}

template <typename Hash>
Hash Shingler<Hash>::shingle_at(int64_t first, int64_t ngram) const {
  Hash out;
  if constexpr (kNarrow<Hash>) {
    FASTSFT_ISA_SELECT(hash_shingles32)(units_.get() + first, ngram, ngram, &out);
  } else {
    FASTSFT_ISA_SELECT(hash_shingles64)(units_.get() + first, ngram, ngram, &out);
  }
  return out;
}

template <typename Hash>
int64_t Shingler<Hash>::hash_shingles(const Hash* units, int64_t count, int64_t ngram) {
  if (count == 0) return 0;
  if constexpr (kNarrow<Hash>) {
    return FASTSFT_ISA_SELECT(hash_shingles32)(units, count, ngram, shingles_.get());
  } else {
    return FASTSFT_ISA_SELECT(hash_shingles64)(units, count, ngram, shingles_.get());
  }
}

template <typename Hash>
void Shingler<Hash>::resize(int64_t length) {
  longest_ = length;
  const std::size_t room = static_cast<std::size_t>(length) + 128;  // the kernels write a little past the text
  // The old ones first: both together would be more than is ever needed.
  lower_.reset();
  edges_.reset();
  units_.reset();
  shingles_.reset();
  lower_ = std::make_unique_for_overwrite<uint8_t[]>(room);
  edges_ = std::make_unique_for_overwrite<uint32_t[]>(room);
  units_ = std::make_unique_for_overwrite<Hash[]>(room);
  shingles_ = std::make_unique_for_overwrite<Hash[]>(room);
}

template class Shingler<uint32_t>;
template class Shingler<uint64_t>;

}  // namespace fastsft
