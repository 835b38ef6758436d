// Chooses the instruction set's kernels and keeps their scratch.
#include "fastsft/shingles.h"

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

template <typename Hash>
constexpr bool kNarrow = sizeof(Hash) == 4;

}  // namespace

void check_lengths(const char* op, const std::string_view* texts, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    FASTSFT_CHECK(texts[i].size() < 0xFFFFFFC0u, op, ": texts[", i, "]: expected fewer than 2^32 - 64 bytes, got ",
                  texts[i].size());
  }
}

template <typename Hash>
int64_t Shingler<Hash>::read(std::string_view text, const ShingleOptions& options) {
  const char* data = text.data();
  const int64_t length = static_cast<int64_t>(text.size());
  fit(length);
  int64_t count;
  if (options.unit == ShingleUnit::kWord) {
    if constexpr (kNarrow<Hash>) {
      count = FASTSFT_ISA_SELECT(hash_words32)(data, length, lower_.data(), edges_.data(), units());
    } else {
      count = FASTSFT_ISA_SELECT(hash_words64)(data, length, lower_.data(), edges_.data(), units());
    }
  } else {
    if constexpr (kNarrow<Hash>) {
      count = FASTSFT_ISA_SELECT(hash_chars32)(data, length, units());
    } else {
      count = FASTSFT_ISA_SELECT(hash_chars64)(data, length, units());
    }
  }
  num_units_ = count;
  return read_units(count, options.ngram);
}

template <typename Hash>
Hash Shingler<Hash>::shingle_at(int64_t first, int64_t ngram) const {
  Hash out;
  if constexpr (kNarrow<Hash>) {
    FASTSFT_ISA_SELECT(hash_shingles32)(units_.data() + first, ngram, ngram, &out);
  } else {
    FASTSFT_ISA_SELECT(hash_shingles64)(units_.data() + first, ngram, ngram, &out);
  }
  return out;
}

template <typename Hash>
int64_t Shingler<Hash>::read_units(int64_t count, int64_t ngram) {
  if (count == 0) return 0;
  if constexpr (kNarrow<Hash>) {
    return FASTSFT_ISA_SELECT(hash_shingles32)(units(), count, ngram, shingles_.data());
  } else {
    return FASTSFT_ISA_SELECT(hash_shingles64)(units(), count, ngram, shingles_.data());
  }
}

template <typename Hash>
void Shingler<Hash>::resize(int64_t length) {
  longest_ = length;
  const std::size_t room = static_cast<std::size_t>(length) + 128;  // the kernels write a little past the text
  lower_.resize(room);
  edges_.resize(room);
  units_.resize(room);
  shingles_.resize(room);
}

template class Shingler<uint32_t>;
template class Shingler<uint64_t>;

}  // namespace fastsft
