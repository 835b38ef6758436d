// Private to csrc/cpu: the sets of shingles of many texts, built by all threads.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "shingle_sets.h"

namespace fastsft {

class TextSets {
 public:
  TextSets(std::span<const std::string_view> texts, const ShingleOptions& options);

  const Fingerprint& print(std::size_t text) const {
    return pieces_[text / kTextsPerPiece].prints[text % kTextsPerPiece];
  }
  Shingles elements(std::size_t text) const {
    const Piece& piece = pieces_[text / kTextsPerPiece];
    const std::size_t i = text % kTextsPerPiece;
    return Shingles(piece.elements).subspan(piece.begins[i], piece.prints[i].size);
  }

 private:
  static constexpr std::size_t kTextsPerPiece = 256;

  struct Piece {
    std::vector<uint64_t> elements;
    std::vector<std::size_t> begins;
    std::vector<Fingerprint> prints;
  };
  std::vector<Piece> pieces_;
};

// The same with equal sets taken together.
struct DistinctSets {
  DistinctSets(std::span<const std::string_view> texts, const ShingleOptions& options);

  TextSets all;
  std::vector<uint32_t> set_of;     // [texts]: equal for texts with equal sets, numbered by the first text with each
  std::vector<Fingerprint> prints;  // [sets]
  std::vector<Shingles> elements;   // [sets]
};

}  // namespace fastsft
