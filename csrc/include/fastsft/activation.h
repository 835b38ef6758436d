// The gate of a gated linear unit with SiLU (arXiv 2002.05202): silu(gate) * up, silu(x) = x / (1 + exp(-x)).
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

struct SwiGlu {
  DType dtype;
  const void *gate, *up;
  int64_t size;
};

void swiglu(const SwiGlu& unit, void* out);
void swiglu_backward(const SwiGlu& unit, const void* grad, void* d_gate, void* d_up);

}  // namespace fastsft
