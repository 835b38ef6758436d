// Private to csrc/cpu: the hashed shingles of one text at a time (shingles.h), in scratch that a thread keeps.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "fastsft/shingles.h"

namespace fastsft {

// Throws Error for a text whose positions do not fit the kernels' 32 bits.
void check_lengths(const char* op, const std::string_view* texts, int64_t n);

// Hash: uint32_t or uint64_t. Room for 5 + 2 * sizeof(Hash) bytes per byte of the longest text or piece so far, of
// which only what is used is ever touched; kept between texts, since allocating it anew for every one took longer than
// the hashing.
template <typename Hash>
class Shingler {
 public:
  // Returns the number of shingles, repeated ones included. They are valid until the next call.
  int64_t read(std::string_view text, const ShingleOptions& options);

  // The same shingles piece by piece, in memory that does not grow with the text: start, then next until it is empty.
  void start(std::string_view text, const ShingleOptions& options);
  std::span<const Hash> next();

  // For units that the caller writes: fit(count), units() [count], then read_units.
  void fit(int64_t length) {
    if (length > longest_) resize(length <= kKept ? length + length / 2 : length);
  }
  Hash* units() { return units_.get(); }
  int64_t read_units(int64_t count, int64_t ngram) { return hash_shingles(units(), count, ngram); }

  const Hash* shingles() const { return shingles_.get(); }
  Hash shingle_at(int64_t first, int64_t ngram) const;  // of the units from `first` on, which are at least ngram

  // Of the text last read.
  int64_t num_units() const { return num_units_; }
  int64_t word_begin(int64_t w) const { return edges_[2 * w]; }
  std::string_view word(int64_t w) const {  // in small letters
    return {reinterpret_cast<const char*>(lower_.get()) + edges_[2 * w], edges_[2 * w + 1] - edges_[2 * w]};
  }

  bool large() const { return longest_ > kKept; }
  void release_if_large() {
    if (large()) *this = Shingler();
  }

 private:
  static constexpr int64_t kKept = int64_t{1} << 20;

  int64_t hash_units(std::string_view text, ShingleUnit unit, Hash* units);
  int64_t hash_shingles(const Hash* units, int64_t count, int64_t ngram);
  void resize(int64_t length);

  int64_t longest_ = -1;
  int64_t num_units_ = 0;
  std::unique_ptr<uint8_t[]> lower_;
  std::unique_ptr<uint32_t[]> edges_;
  std::unique_ptr<Hash[]> units_, shingles_;

  // Of the text that is read in pieces: what is left, and the last units before it.
  std::string_view rest_;
  ShingleOptions options_;
  std::vector<Hash> tail_;
  bool repeats_ = false;  // rest_ begins with the last of these
  bool any_ = false, done_ = true;
};

extern template class Shingler<uint32_t>;
extern template class Shingler<uint64_t>;

}  // namespace fastsft
