// Private to csrc/cpu: the work of norm.isa.cpp, rope.isa.cpp and activation.isa.cpp on a range, for ops that divide it
// in their own way. A row's bits do not depend on the range it is in.
#pragma once

#include <cstdint>

#include "fastsft/activation.h"
#include "fastsft/isa.h"
#include "fastsft/norm.h"
#include "fastsft/rope.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(void, rms_norm_rows, const RmsNorm&, void* out, float* scale, int64_t begin, int64_t end)
FASTSFT_ISA_DECLARE(void, rope_tokens, const Rope&, bool inverse, void* out, int64_t begin, int64_t end)
FASTSFT_ISA_DECLARE(void, swiglu_range, const SwiGlu&, void* out, int64_t begin, int64_t end)

}  // namespace fastsft
