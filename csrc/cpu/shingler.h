// Private to csrc/cpu: the hashed shingles of one text at a time (shingles.h), in scratch that a thread keeps.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "fastsft/shingles.h"

namespace fastsft {

// Throws Error for a text whose positions do not fit the kernels' 32 bits.
void check_lengths(const char* op, const std::string_view* texts, int64_t n);

// Hash: uint32_t or uint64_t. About 5 + 2 * sizeof(Hash) bytes per byte of the longest text so far, kept between texts:
// allocating it anew for every one took longer than the hashing.
template <typename Hash>
class Shingler {
 public:
  // Returns the number of shingles, repeated ones included. They are valid until the next call.
  int64_t read(std::string_view text, const ShingleOptions& options);

  // For units that the caller writes: fit(count), units() [count], then read_units.
  void fit(int64_t length) {
    if (length > longest_) resize(length + length / 2);
  }
  Hash* units() { return units_.data(); }
  int64_t read_units(int64_t count, int64_t ngram);

  const Hash* shingles() const { return shingles_.data(); }
  Hash shingle_at(int64_t first, int64_t ngram) const;  // of the units from `first` on, which are at least ngram

  // Of the text last read.
  int64_t num_units() const { return num_units_; }
  int64_t word_begin(int64_t w) const { return edges_[2 * w]; }
  std::string_view word(int64_t w) const {  // in small letters
    return {reinterpret_cast<const char*>(lower_.data()) + edges_[2 * w], edges_[2 * w + 1] - edges_[2 * w]};
  }

  bool large() const { return longest_ > int64_t{1} << 20; }
  void release_if_large() {
    if (large()) *this = Shingler();
  }

 private:
  void resize(int64_t length);

  int64_t longest_ = -1;
  int64_t num_units_ = 0;
  std::vector<uint8_t> lower_;
  std::vector<uint32_t> edges_;
  std::vector<Hash> units_, shingles_;
};

extern template class Shingler<uint32_t>;
extern template class Shingler<uint64_t>;

}  // namespace fastsft
