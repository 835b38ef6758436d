// Many texts to ids at once, packed: what one call of ByteBpe::encode gives each, on all threads.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "fastsft/bpe.h"

namespace fastsft {

class BpeTexts {
 public:
  // Encodes; `encoder` and `texts` are not needed afterwards.
  BpeTexts(const ByteBpe& encoder, const std::vector<std::string_view>& texts);

  int64_t num_texts() const { return static_cast<int64_t>(exact_.size()); }
  int64_t num_tokens() const { return cu_seqlens_.back(); }
  // Code points whose class the encoder lacks, ascending: the texts that hold them are not exact.
  const std::vector<uint32_t>& unknown() const { return unknown_; }

  // ids [num_tokens()], text i has ids[cu_seqlens[i] : cu_seqlens[i + 1]]; cu_seqlens [N + 1]; exact [N]: 0 where
  // ByteBpe::encode cannot tell the ids, and there are none.
  void write(int32_t* ids, int64_t* cu_seqlens, uint8_t* exact) const;

 private:
  std::vector<std::vector<int32_t>> stores_;  // one per task
  std::vector<int64_t> cu_seqlens_;
  std::vector<uint8_t> exact_;
  std::vector<uint32_t> unknown_;
};

}  // namespace fastsft
