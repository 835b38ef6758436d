// Per element, forward: gate and up read, the result written: 12 bytes in float32, 6 in 16 bits, one exp. Backward:
// three read, two written: 20 or 10 bytes, one exp. Memory-bound.
#include "fastsft/activation.h"

#include "partial.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

FASTSFT_INLINE Vec sigmoid(Vec x) {
  const VecInt negative = x < 0.0f;
  const Vec e = exp_nonpositive(select(negative, x, -x));
  return select(negative, e, splat(1.0f)) / (1.0f + e);
}

}  // namespace

void swiglu_range(const SwiGlu& unit, void* out, int64_t begin, int64_t end) {
  with_dtype(unit.dtype, [&]<DType kDType>() {
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec x = load_until(kDType, unit.gate, j, end);
      store_until(kDType, out, j, end, x * sigmoid(x) * load_until(kDType, unit.up, j, end));
    }
  });
}

void swiglu_backward_range(const SwiGlu& unit, const void* grad, void* d_gate, void* d_up, int64_t begin, int64_t end) {
  with_dtype(unit.dtype, [&]<DType kDType>() {
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec x = load_until(kDType, unit.gate, j, end), g = load_until(kDType, grad, j, end);
      const Vec s = sigmoid(x);
      store_until(kDType, d_gate, j, end, g * load_until(kDType, unit.up, j, end) * (s + x * s * (1.0f - s)));
      store_until(kDType, d_up, j, end, g * x * s);
    }
  });
}

}  // namespace fastsft::FASTSFT_ISA_NS
