// Rotary position embedding (arXiv 2104.09864) in the split-half layout of Hugging Face checkpoints: the pair
// (x[i], x[i + K / 2]) of every head turns by the token's i-th angle. The inverse, which is also the backward pass,
// turns the other way.
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

struct Rope {
  DType dtype;
  const void* x;          // [tokens, heads, size], size even
  const void *cos, *sin;  // [tokens, size / 2], like x
  int64_t tokens, heads, size;
};

void rope(const Rope& rope, bool inverse, void* out);

}  // namespace fastsft
