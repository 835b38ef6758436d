#include "fastsft/activation.h"

#include "fastsft/parallel.h"
#include "row_kernels.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(void, swiglu_backward_range, const SwiGlu&, const void* grad, void* d_gate, void* d_up,
                    int64_t begin, int64_t end)

namespace {

constexpr int64_t kElements = 16384;  // per unit of work: tens of microseconds; whole vectors on every CPU

}  // namespace

void swiglu(const SwiGlu& unit, void* out) {
  const auto range = FASTSFT_ISA_SELECT(swiglu_range);
  parallel_for(unit.size, kElements, [&](int64_t begin, int64_t end) { range(unit, out, begin, end); });
}

void swiglu_backward(const SwiGlu& unit, const void* grad, void* d_gate, void* d_up) {
  const auto range = FASTSFT_ISA_SELECT(swiglu_backward_range);
  parallel_for(unit.size, kElements, [&](int64_t begin, int64_t end) { range(unit, grad, d_gate, d_up, begin, end); });
}

}  // namespace fastsft
